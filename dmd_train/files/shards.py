"""Many rows of tensors on disk, in safetensors files of some rows each: made once, resumable."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .read import read_safetensors
from .write import gone, require_folder, write_safetensors

ORIGIN_KEY = "dmd.origin"
IN_MEMORY = 1 << 30
"""Bytes up to which all rows are held in memory; beyond, they are mapped."""


def make_shards(
    folder: Path,
    total: int,
    size: int,
    origin: str,
    make: Callable[[range], dict[str, Tensor]],
    rank: int = 0,
    count: int = 1,
) -> Iterator[int]:
    """Files of `size` rows each until there are `total`, yielding how many rows there are.

    `make` is given the rows of one file. A whole file of the same `origin` is not made again.
    Process `rank` makes each `count`-th. Raises UserError for a file of another origin, and where
    the folder is taken away.
    """
    require_folder(folder)
    for start in range(rank * size, total, count * size):
        rows = range(start, min(start + size, total))
        file = folder / f"shard-{start // size:05d}.safetensors"
        if not _is_made(file, origin, len(rows)):
            tensors = make(rows)
            if not folder.exists():
                raise gone(folder)
            write_safetensors(file, tensors, {ORIGIN_KEY: origin})
        yield rows.stop


def _is_made(file: Path, origin: str, rows: int) -> bool:
    if not file.exists():
        return False
    try:
        tensors, metadata = read_safetensors(file)
    except UserError:
        return False
    if metadata.get(ORIGIN_KEY) != origin:
        raise UserError(
            f"{file}: made by another teacher, from other prompts or by other settings. "
            f"Delete {file.parent}, or choose another output."
        )
    return bool(tensors) and all(value.shape[:1] == (rows,) for value in tensors.values())


class Shards:
    """The rows of all files of a folder. Raises UserError where there are none."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("shard-*.safetensors"))
        if not files:
            raise UserError(f"{folder}: holds no shards. Make them again.")
        self.parts = [read_safetensors(file)[0] for file in files]
        lengths = torch.tensor([len(next(iter(part.values()))) for part in self.parts])
        self.ends = lengths.cumsum(0)
        tensors = [value for part in self.parts for value in part.values()]
        if sum(value.nbytes for value in tensors) <= IN_MEMORY:
            self.parts = [{key: torch.cat([p[key] for p in self.parts]) for key in self.parts[0]}]
            self.ends = self.ends[-1:]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def column(self, key: str) -> Tensor:
        """One tensor of all rows, in memory."""
        return torch.cat([part[key] for part in self.parts])

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        """These rows of every tensor, on the CPU. rows: (N,) int64."""
        if len(self.parts) == 1:
            return {key: value[rows] for key, value in self.parts[0].items()}
        part = torch.searchsorted(self.ends, rows, right=True)
        within = rows - torch.cat([self.ends.new_zeros(1), self.ends])[part]
        where = list(zip(part.tolist(), within.tolist(), strict=True))
        keys = self.parts[0]
        return {key: torch.stack([self.parts[p][key][i] for p, i in where]) for key in keys}
