"""Small runs on Stable Diffusion teachers, and what tests do to them."""

import os
import signal
from typing import Any

import pytest
from torch import Tensor

from dmd_train.iteration import Distillation

PROMPTS = ["a red fox", "a blue bird", "a green tree"]
SMALL: dict[str, Any] = {
    "preset": "sd15-one-step-lora",
    "device": "cpu",
    "steps": 3,
    "batch_size": 1,
    "micro_batch_size": 1,
    "critic_updates": 1,
    "lora_rank": 2,
    "gradient_checkpointing": False,
    "regression_weight": 0.0,
    "pairs": 3,
    "pair_batch_size": 1,
    "pair_steps": 2,
    "checkpoint_every": 100,
    "sample_every": 100,
}
LEARNS = {"learning_rate": 1e-3, "warmup_steps": 0}
"""Fast enough for a few steps to show."""


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C during student update `after`, from 1."""
    iteration = Distillation.iteration

    def interrupted(self: Distillation, step: int, pairs: Any) -> dict[str, Tensor]:
        if step + 1 == after:
            os.kill(os.getpid(), signal.SIGINT)
        return iteration(self, step, pairs)

    monkeypatch.setattr(Distillation, "iteration", interrupted)


def calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call from now on."""
    made: list[tuple[Any, ...]] = []
    real = getattr(owner, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        made.append(arguments)
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, noted)
    return made


def encoded(made: list[tuple[Any, ...]]) -> list[list[str]]:
    """What `TextEncoder.encode` was given, but for the empty prompt of guidance."""
    return [arguments[1] for arguments in made if arguments[1] != [""]]
