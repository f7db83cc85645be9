"""Noise and the teacher's image from it, for the regression objective (DMD section 3.3)."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..files.shards import Shards, make_shards
from ..method.network import Network
from ..method.processes import Processes
from ..method.sample import sample_teacher
from ..method.seeding import generator, randn, stream_seed
from .conditions import Conditions

BYTES = 1 << 20
"""Noise in one shard, about: one step of the progress bar, and of what a stop loses."""


@dataclass(frozen=True)
class PairBatch:
    """row: (N,) of the conditions; noise, image: (N, C, H, W)."""

    row: Tensor
    noise: Tensor
    image: Tensor


class Pairs(Protocol):
    """A source of pairs."""

    def draw(self, size: int, gen: torch.Generator) -> Tensor:
        """`size` random pairs by number, with replacement. `gen` is the CPU's."""

    def take(self, numbers: Tensor, device: torch.device) -> PairBatch:
        """The pairs of these numbers, on `device`."""


class StoredPairs(Pairs):
    """The pairs of a folder, each seed once."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        _, first = np.unique(shards.column("seed").numpy(), return_index=True)
        self.kept = torch.from_numpy(first).sort().values

    def __len__(self) -> int:
        return len(self.kept)

    def draw(self, size: int, gen: torch.Generator) -> Tensor:
        return torch.randint(len(self), (size,), generator=gen)

    def take(self, numbers: Tensor, device: torch.device) -> PairBatch:
        tensors = self.shards.take(self.kept[numbers])
        noise, image = (tensors[key].to(device).float() for key in ("noise", "image"))
        return PairBatch(tensors["row"], noise, image)


def shard_size(shape: tuple[int, int, int]) -> int:
    """Pairs in one file: at most 500, fewer where they are large."""
    return max(4, min(500, BYTES // (4 * torch.Size(shape).numel())))


Sample = Callable[[Tensor, Tensor, int], Tensor]
"""A deterministic sampler of some teacher: noise (N, C, H, W) ~ N(0, I), rows (N,) of the
conditions, the first one's number among the pairs -> x0 (N, C, H, W) in the network's scale."""


def make_pairs(
    folder: Path,
    total: int,
    seed: int,
    shape: tuple[int, int, int],
    conditions: Conditions,
    batch_size: int,
    origin: str,
    sample: Sample,
    processes: Processes | None = None,
) -> Iterator[int]:
    """Make `total` pairs into `folder`, deterministically, yielding how many there are.

    Pair i is a function of (seed, i). Stored in float16. `origin` names the teacher, the
    conditions and how it is sampled: pairs of another origin are not mixed in.
    """
    cpu = torch.device("cpu")

    def make(numbers: range) -> dict[str, Tensor]:
        gens = [generator(cpu, seed, "pair", i) for i in numbers]
        row = torch.cat([conditions.rows(1, gen) for gen in gens])
        noise = torch.stack([randn(shape, gen) for gen in gens]).half().float()
        firsts = numbers[::batch_size]
        batches = zip(noise.split(batch_size), row.split(batch_size), firsts, strict=True)
        images = [sample(z, rows, first).cpu() for z, rows, first in batches]
        seeds = torch.tensor([stream_seed(seed, "pair", i) for i in numbers])
        return {"seed": seeds, "row": row, "noise": noise.half(), "image": torch.cat(images).half()}

    rank, count = (processes.rank, processes.count) if processes else (0, 1)
    yield from make_shards(folder, total, shard_size(shape), origin, make, rank, count)


def teacher_sample(teacher: Network, conditions: Conditions, config: Config) -> Sample:
    """The teacher's sampling by the engine, as the config has it."""

    def sample(noise: Tensor, rows: Tensor, first: int) -> Tensor:
        return sample_teacher(
            teacher,
            noise.to(teacher.device),
            conditions.take(rows, teacher.device),
            config.pair_sampler,
            config.pair_steps,
            config.guidance,
        )

    return sample


def origin_of(made_from: str, config: Config) -> str:
    """The origin of pairs by `teacher_sample`. made_from: the teacher and the conditions."""
    made_by = ("seed", "pair_sampler", "pair_steps", "guidance", "resolution")
    return json.dumps([made_from, *(getattr(config, key) for key in made_by)])
