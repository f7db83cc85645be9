"""Noise and the teacher's image from it, for the regression objective (DMD section 3.3)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .conditions import Conditions
from .config import Config
from .network import Network
from .processes import Processes
from .sample import sample_teacher
from .seeding import generator, randn, stream_seed
from .shards import Shards, make_shards

BYTES = 1 << 20
"""Of noise in one shard, about: one step of the progress bar, and of what a stop loses."""


@dataclass(frozen=True)
class PairBatch:
    """row: (N,) of the conditions; noise, image: (N, C, H, W)."""

    row: Tensor
    noise: Tensor
    image: Tensor


class Pairs:
    """The pairs of a folder, each seed once."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        first = {seed: i for i, seed in reversed(list(enumerate(shards.column("seed").tolist())))}
        self.kept = torch.tensor(sorted(first.values()))

    def __len__(self) -> int:
        return len(self.kept)

    def draw(self, size: int, gen: torch.Generator) -> Tensor:
        """`size` random pairs by number, with replacement. `gen` is the CPU's."""
        return torch.randint(len(self), (size,), generator=gen)

    def take(self, numbers: Tensor, device: torch.device) -> PairBatch:
        tensors = self.shards.take(self.kept[numbers])
        noise, image = (tensors[key].to(device).float() for key in ("noise", "image"))
        return PairBatch(tensors["row"], noise, image)


def shard_size(shape: tuple[int, int, int]) -> int:
    """Pairs in one file: at most 500, fewer where they are large."""
    return max(4, min(500, BYTES // (4 * torch.Size(shape).numel())))


def make_pairs(
    folder: Path,
    teacher: Network,
    conditions: Conditions,
    config: Config,
    origin: str,
    processes: Processes,
) -> Iterator[int]:
    """Make config.pairs into `folder`, deterministically, yielding how many there are.

    Pair i is a function of (config.seed, i). Stored in float16. `origin` names the teacher and the
    conditions: pairs of another origin are not mixed in.
    """
    made_by = ("seed", "pair_sampler", "pair_steps", "guidance", "resolution")
    origin = json.dumps([origin, *(getattr(config, key) for key in made_by)])
    cpu = torch.device("cpu")

    def make(numbers: range) -> dict[str, Tensor]:
        gens = [generator(cpu, config.seed, "pair", i) for i in numbers]
        row = torch.cat([conditions.rows(1, gen) for gen in gens])
        noise = torch.stack([randn(teacher.shape, gen) for gen in gens]).half().float()
        images = []
        for z, rows in zip(*(x.split(config.pair_batch_size) for x in (noise, row)), strict=True):
            condition = conditions.take(rows, teacher.device)
            image = sample_teacher(
                teacher,
                z.to(teacher.device),
                condition,
                config.pair_sampler,
                config.pair_steps,
                config.guidance,
            )
            images.append(image.cpu())
        seed = torch.tensor([stream_seed(config.seed, "pair", i) for i in numbers])
        return {"seed": seed, "row": row, "noise": noise.half(), "image": torch.cat(images).half()}

    size = shard_size(teacher.shape)
    rank, count = processes.rank, processes.count
    yield from make_shards(folder, config.pairs, size, origin, make, rank, count)
