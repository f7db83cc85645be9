"""What the presets say learns: their timestep, noise and pairs, on digits that take seconds.

Bars have room over what was measured, which is beside them; docs/findings/what-learns.md has more.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
from kit.testbeds import SAMPLER, SAMPLER_STEPS, Learned, Testbed, testbed_m

from dmd_train.config import make_config
from dmd_train.method.noise import Flow
from dmd_train.presets import PRESETS, families_of

TEACHER_STEPS = 800
SHORT: dict[str, Any] = {
    "device": "cpu",
    "gradient_checkpointing": False,
    "optimizer": "adamw",
    "steps": 80,
    "batch_size": 8,
    "micro_batch_size": 0,
    "learning_rate": 4e-3,
    "warmup_steps": 0,
    "schedule": "cosine",
    "ema_decay": 0.9,
    "lora_rank": 8,
    "lora_alpha": 8.0,
    "critic_updates": 4,
    "guidance": 1.5,
    "pairs": 64,
    "pair_batch_size": 8,
    "pair_sampler": SAMPLER,
    "pair_steps": SAMPLER_STEPS,
    "checkpoint_every": 10**9,
    "sample_every": 10**9,
}
"""The size of a run. What is learned from, at which timestep and from which noise, is the preset's."""

PRESETS_HERE = {
    name: preset
    for name, preset in PRESETS.items()
    if name not in ("digits-one-step", "sd15-paper", "sd15-dmd2")
}
"""Those for small batches; the embedded digits have `make demo`."""


@pytest.fixture(scope="module")
def eps() -> Testbed:
    return testbed_m(steps=TEACHER_STEPS)


@pytest.fixture(scope="module")
def flow() -> Testbed:
    return testbed_m(steps=TEACHER_STEPS, noise=Flow())


def learn(bed: Testbed, preset: str, folder: Path, **settings: Any) -> Learned:
    if families := families_of(preset):
        bed.network.family = families[0]
    own = {"teacher": "M", "preset": preset, "output": str(folder / "run")}
    if bed.sampler == "euler":
        own["pair_sampler"] = "euler"
    learned = bed.distil(make_config(SHORT | own | settings, "a test"))
    print(f"{preset} {settings}: {learned}", file=sys.stderr)
    return learned


@pytest.mark.parametrize("preset", PRESETS_HERE)
def test_a_presets_own_timestep_noise_and_pairs_learn_in_eighty_steps(
    preset: str, eps: Testbed, flow: Testbed, tmp_path: Path
) -> None:
    bed = eps if families_of(preset) else flow
    learned = learn(bed, preset, tmp_path)
    assert learned.last.distance < 0.5 * learned.first.distance


def test_the_same_at_999_learns_nothing(eps: Testbed, tmp_path: Path) -> None:
    last = {"conditioning_timestep": 999, "input_noise": "unit"}
    learned = learn(eps, "sd15-one-step-lora", tmp_path, **last)
    assert learned.last.distance > 0.8 * learned.first.distance


def test_matching_adds_to_few_pairs(eps: Testbed, tmp_path: Path) -> None:
    both = learn(eps, "sd15-one-step-lora", tmp_path / "both")
    alone = learn(
        eps, "sd15-one-step-lora", tmp_path / "alone", regression_warmup_steps=SHORT["steps"]
    )
    assert both.last.distance < alone.last.distance
