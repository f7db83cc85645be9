"""What the presets say learns: their timestep, noise and pairs, on digits that take seconds.

docs/findings/what-learns.md has longer runs, seeds, and a teacher that is told prompts.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from kit import testbeds  # not its names: pytest would run testbed_m as a test
from kit.testbeds import SAMPLER, SAMPLER_STEPS, Learned

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
"""The size of a run. Timestep, noise, beta1, and how long the pairs count are the preset's own."""

FOR_SMALL_BATCHES = PRESETS.keys() - {"sd15-paper", "sd15-dmd2", "digits-one-step"}
"""The embedded digits have `make demo`."""

NEARER = 0.6
"""Last over first distance. Measured: 0.37 to 0.50 of eps models, 0.25 of a flow; at 999, 1.16."""


@pytest.fixture(scope="module")
def eps() -> testbeds.Testbed:
    return testbeds.testbed_m(steps=TEACHER_STEPS)


@pytest.fixture(scope="module")
def flow() -> testbeds.Testbed:
    return testbeds.testbed_m(steps=TEACHER_STEPS, noise=Flow())


@pytest.fixture(scope="module")
def known() -> dict[str, Learned]:
    """What was learned, by what it was told: presets that say the same are one run."""
    return {}


def learn(
    bed: testbeds.Testbed, known: dict[str, Learned], preset: str, folder: Path, **settings: Any
) -> Learned:
    if families := families_of(preset):
        bed.network.family = families[0]
    whole = PRESETS[preset].settings
    warm_up = SHORT["steps"] * whole.get("regression_warmup_steps", 0) // whole["steps"]
    own = SHORT | {"pair_sampler": bed.sampler, "regression_warmup_steps": warm_up} | settings
    told = json.dumps(whole | own, sort_keys=True)
    if told not in known:
        run = own | {"teacher": "M", "preset": preset, "output": str(folder / "run")}
        known[told] = bed.distil(make_config(run, "a test"))
    print(f"{preset} {settings}: {known[told]}", file=sys.stderr)
    return known[told]


@pytest.mark.parametrize("preset", sorted(FOR_SMALL_BATCHES))
def test_eighty_steps_of_a_preset_bring_its_student_nearer_and_leave_it_diverse(
    preset: str, request: pytest.FixtureRequest, known: dict[str, Learned], tmp_path: Path
) -> None:
    bed = request.getfixturevalue("eps" if families_of(preset) else "flow")
    learned = learn(bed, known, preset, tmp_path)
    assert learned.last.distance < NEARER * learned.first.distance
    assert 0.5 < learned.last.diversity < 1.1


def test_at_999_the_bar_is_not_reached(
    eps: testbeds.Testbed, known: dict[str, Learned], tmp_path: Path
) -> None:
    last = {"timesteps": [999], "input_noise": "unit"}
    learned = learn(eps, known, "sd15-one-step-lora", tmp_path, **last)
    assert learned.last.distance > NEARER * learned.first.distance
