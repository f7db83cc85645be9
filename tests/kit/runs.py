"""What a run has left in its folder, read back and compared."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmd_train.files.read import read_safetensors


def metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without the seconds, which no two runs share."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def logged_steps(run: Path) -> list[int]:
    """Steps in metrics.jsonl."""
    return [row["step"] for row in metrics(run)]


def newest(run: Path) -> Path:
    """The checkpoint of the last step."""
    return max(run.glob("checkpoints/step-*.safetensors"))


def newest_step(run: Path) -> int:
    """The step of that checkpoint."""
    return int(newest(run).stem.removeprefix("step-"))


def state(run: Path) -> dict[str, Tensor]:
    """Tensors of that checkpoint."""
    return read_safetensors(newest(run))[0]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether these are the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def same_files(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    return same(load_file(one), load_file(other))


def apart(one: dict[str, Tensor], other: dict[str, Tensor], part: str) -> float:
    """Relative distance of two states in the tensors of `part`, without the optimiser's."""
    keys = [k for k in other if k.startswith(part) and "@" not in k]
    assert keys and keys == [k for k in one if k.startswith(part) and "@" not in k]
    a, b = (torch.cat([of[k].double().flatten() for k in keys]) for of in (one, other))
    return float((a - b).norm() / b.norm())
