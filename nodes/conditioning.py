"""A CONDITIONING as the conditions of a distillation: each row of each entry is one."""

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..dmd_train.errors import UserError
from .class_label import LABEL
from .fingerprint import digest

PROMPT = "dmd_prompt"
"""Where DMD Prompts leaves a condition's text, for a run to be written down by."""

Conditioning = list[list[Any]]
"""ComfyUI's CONDITIONING: entries [tensor (B, L, D) or None, options]."""

Row = list[Any]
"""An entry of batch 1: one condition."""

MORE = {
    "control": "a ControlNet",
    "area": "an area",
    "mask": "a mask",
    "gligen": "GLIGEN boxes",
    "hooks": "hooks",
}
"""What an entry may be beside a prompt -> its name in a message."""


def rows_of(conditioning: Conditioning) -> list[Row]:
    """Its conditions, one by one. Raises UserError for one that is more than a plain prompt."""
    rows = []
    for number, (tensor, options) in enumerate(conditioning, 1):
        _require_plain(number, options)
        batch = options.get(LABEL) if tensor is None else tensor
        count = 1 if batch is None else len(batch)
        for i in range(count):
            own = {key: _part(value, i, count) for key, value in options.items()}
            rows.append([_part(tensor, i, count), own])
    return rows


def joined(rows: Sequence[Row]) -> Conditioning | None:
    """A CONDITIONING of one entry with all the rows in it; None where they cannot be a batch.

    That is where their tensors are of different shapes, as those of a short and a long prompt,
    or their other options of different values.
    """
    tensors, options = zip(*rows, strict=True)
    whole = {}
    for key in dict.fromkeys(key for own in options for key in own if key != PROMPT):
        if not all(key in own for own in options):
            return None
        whole[key] = [own[key] for own in options]
    if not all(map(_is_alike, (tensors, *whole.values()))):
        return None
    return [[_together(tensors), {key: _together(values) for key, values in whole.items()}]]


def all_classes(model: ModelPatcher) -> Conditioning:
    """Every class that a class-conditional MODEL knows."""
    return [[None, {LABEL: torch.arange(model.model.classes)}]]


def fingerprint(rows: Sequence[Row]) -> str:
    """A name of the conditions: SHA-256 over tensors, texts and other options, hexadecimal."""
    return digest(rows)


def _require_plain(number: int, options: dict[str, Any]) -> None:
    found = [name for key, name in MORE.items() if options.get(key) is not None]
    if options.get("start_percent", 0.0) != 0 or options.get("end_percent", 1.0) != 1:
        found.append("a range of timesteps")
    if found:
        raise UserError(
            f"conditioning: entry {number} has {' and '.join(found)}, which a student cannot "
            "learn. Wire the plain prompt."
        )


def _part(value: Any, i: int, count: int) -> Any:
    return value[i : i + 1] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value


def _is_alike(values: Sequence[Any]) -> bool:
    first = values[0]
    if isinstance(first, Tensor) and first.shape[:1] == (1,):
        return all(isinstance(value, Tensor) and value.shape == first.shape for value in values)
    if isinstance(first, int | float | str):
        return all(isinstance(value, int | float | str) and value == first for value in values)
    return all(value is first for value in values)


def _together(values: Sequence[Any]) -> Any:
    first = values[0]
    is_row = isinstance(first, Tensor) and first.shape[:1] == (1,)
    return torch.cat(list(values)) if is_row else first
