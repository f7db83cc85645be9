"""A run of the embedded digits of a tenth of a second, by the way that both doors take."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from dmd_train.config import Config, make_config
from dmd_train.distil import distil
from dmd_train.networks.load import load_teacher
from dmd_train.prepare import carried_out, prepare
from dmd_train.run.folder import RunFolder

SHORT = {
    "teacher": "digits",
    "training": "lora",
    "lora_rank": 1,
    "steps": 4,
    "batch_size": 2,
    "critic_updates": 1,
    "pairs": 8,
    "pair_batch_size": 2,
    "pair_steps": 1,
    "checkpoint_every": 2,
    "sample_every": 3,
}
"""Two checkpoints and three pictures, one of them at the last checkpoint."""


def config_of(folder: Path, **settings: object) -> Config:
    """Of a run in folder/run."""
    return make_config(SHORT | {"output": str(folder / "run")} | settings, "test")


def train(
    config: Config, stop_after: int = 0, at: Callable[[int], object] = lambda step: None
) -> list[str]:
    """Nothing where it is finished, else the rest, or up to a stop. Returns the run's notes.

    at: called at each step.
    """
    with RunFolder(config) as run:
        if run.finished:
            return ["finished before"]
        loaded = load_teacher(config, torch.device("cpu"))
        ready = carried_out(prepare(run, loaded), lambda _: None)
        with closing(distil(ready)) as reports:
            for report in reports:
                at(report.step)
                if report.step == stop_after:
                    break
    return run.notes
