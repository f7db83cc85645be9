"""Learning is real: text-conditional students of a teacher that has learned something.

The teacher draws coloured digits and shapes in latents (tests/assets, trained by the script there).
A student is trained by the command line and then held against the teacher's guided samples.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from kit.command_line import Command
from torch import Tensor

from dmd_train.method.network import Condition
from dmd_train.method.recipe import Recipe
from dmd_train.method.sample import sample_student, sample_teacher
from dmd_train.method.seeding import generator, randn
from dmd_train.networks.load import load
from dmd_train.networks.loaded import Loaded
from dmd_train.run.metrics import frechet_distance

ASSETS = Path(__file__).parents[1] / "assets"
TEACHER = ASSETS / "coloured-digits"
CPU = torch.device("cpu")
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
THINGS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("circle", "square", "triangle", "cross"),
)
PROMPTS = [
    f"a {colour} {thing} on {ground}"
    for colour in COLOURS
    for thing in THINGS
    for ground in COLOURS
    if ground != colour
]
SAMPLES = 1024
GUIDANCE = 1.5
SAMPLER = "dpmpp-2m"
RUN = {
    "teacher": str(TEACHER),
    "prompts": "prompts.txt",
    "batch_size": 32,
    "micro_batch_size": 0,
    "critic_updates": 4,
    "guidance": GUIDANCE,
    "t_max": 700,
    "conditioning_timestep": 399,
    "warmup_steps": 0,
    "schedule": "cosine",
    "ema_decay": 0.95,
    "gradient_checkpointing": False,
    "pair_sampler": SAMPLER,
    "pair_steps": 8,
    "sample_every": 100,
    "checkpoint_every": 100,
}
WAYS: dict[str, dict[str, object]] = {
    "lora": {
        "preset": "sd15-one-step-lora",
        "steps": 48,
        "learning_rate": 4e-3,
        "lora_rank": 32,
        "lora_alpha": 32,
        "regression_weight": 2.0,
        "regression_warmup_steps": 26,
        "regression_loss": "mse",
        "pairs": 512,
        "pair_batch_size": 64,
        "critic_updates": 2,
    },
    "full": {"preset": "sd15-one-step-full", "learning_rate": 8e-4, "steps": 76},
}


class Held(NamedTuple):
    """Noise, conditions, and the guided teacher's samples: (N, 4, 8, 8)."""

    z: Tensor
    condition: Condition
    image: Tensor


def in_parts(draw: Callable[[Tensor, Condition], Tensor], z: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        parts = zip(z.split(128), text.split(128), strict=True)
        return torch.cat([draw(noise, {"text": part}) for noise, part in parts])


@pytest.fixture(scope="module")
def teacher() -> Loaded:
    return load(str(TEACHER), CPU)


@pytest.fixture(scope="module")
def held(teacher: Loaded) -> Held:
    assert teacher.text
    gen = generator(CPU, 0, "held")
    chosen = torch.randint(len(PROMPTS), (SAMPLES,), generator=gen).tolist()
    condition = teacher.text.encode([PROMPTS[i] for i in chosen])
    z = randn((SAMPLES, *teacher.network.shape), gen)
    image = in_parts(
        lambda z, c: sample_teacher(teacher.network, z, c, SAMPLER, 12, GUIDANCE),
        z,
        condition["text"],
    )
    return Held(z, condition, image)


def distance(student: Loaded, recipe: Recipe, held: Held) -> float:
    """Frechet, in the 256 values of a latent."""
    images = in_parts(
        lambda z, c: sample_student(student.network, recipe, c, [z]),
        held.z,
        held.condition["text"],
    )
    return frechet_distance(images, held.image)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_some_dozen_steps_cut_the_distance_to_the_guided_teacher_tenfold(
    way: str, teacher: Loaded, held: Held, dmd: Command, tmp_path: Path
) -> None:
    """The LoRA with pairs, the full student from prompts alone; see benchmarks/README.md."""
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    Path("run.yaml").write_text(yaml.safe_dump(RUN | WAYS[way] | {"output": "run"}))
    done = dmd("train", "run.yaml")
    assert done.code == 0, done.err
    student = load("run/student.safetensors", CPU)
    assert student.recipe
    before = distance(teacher, student.recipe, held)
    after = distance(student, student.recipe, held)
    print(f"{way}: {before:.2f} -> {after:.2f}", file=sys.stderr)
    assert after < before / 10
