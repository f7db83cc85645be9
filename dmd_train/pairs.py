"""Noise and the teacher's image from it, for the regression objective (DMD section 3.3)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .conditions import Conditions
from .config import Config
from .files import read_safetensors, write_safetensors
from .network import Condition, Network
from .sample import sample_heun
from .seeding import generator, randn

CHUNK = 500
"""Pairs made at a time: enough to fill the processor, and one step of the progress bar."""


@dataclass(frozen=True)
class Pairs:
    """noise, image: (N, C, H, W); condition: N conditions."""

    noise: Tensor
    image: Tensor
    condition: Condition

    def batch(self, size: int, gen: torch.Generator) -> "Pairs":
        """`size` random pairs, with replacement."""
        rows = torch.randint(len(self.noise), (size,), generator=gen, device=gen.device)
        condition = {key: value[rows] for key, value in self.condition.items()}
        return Pairs(self.noise[rows], self.image[rows], condition)


def make_pairs(
    path: Path, teacher: Network, conditions: Conditions, config: Config
) -> Iterator[int]:
    """Make config.pairs by deterministic Heun into the file `path`, yielding how many there are."""
    made: list[Pairs] = []
    for start in range(0, config.pairs, CHUNK):
        size = min(CHUNK, config.pairs - start)
        gen = generator(teacher.device, config.seed, "pairs", start)
        noise = randn((size, *teacher.shape), gen)
        condition = conditions.batch(size, gen)
        image = sample_heun(teacher, noise, condition, config.pair_steps, config.guidance)
        made.append(Pairs(noise, image, condition))
        yield start + size
    tensors = {
        "noise": torch.cat([pairs.noise for pairs in made]),
        "image": torch.cat([pairs.image for pairs in made]),
    }
    for key in made[0].condition:
        tensors[f"condition.{key}"] = torch.cat([pairs.condition[key] for pairs in made])
    write_safetensors(path, tensors, {})


def load_pairs(path: Path, device: torch.device) -> Pairs:
    tensors = {key: value.to(device) for key, value in read_safetensors(path)[0].items()}
    noise, image = tensors.pop("noise"), tensors.pop("image")
    condition = {key.removeprefix("condition."): value for key, value in tensors.items()}
    return Pairs(noise, image, condition)
