"""The student as a file: weights, recipe, and what is needed to build the network again."""

from pathlib import Path

import torch
from torch import Tensor

from ..files.write import write_safetensors
from ..method.network import Network
from ..method.recipe import Recipe


def write_weights(
    path: Path,
    tensors: dict[str, Tensor],
    recipe: Recipe,
    network: Network,
    dtype: torch.dtype,
    beside: dict[str, Tensor] | None = None,
    marks: dict[str, str] | None = None,
) -> None:
    """Weights under their names in a file, with the recipe of `network`'s student. Atomic.

    beside: other weights, which keep their dtype. marks: what it says of its checkpoint.
    """
    channels, height, width = network.shape
    pixels = (channels, network.downscale * height, network.downscale * width)
    metadata = recipe.to_metadata(f"{recipe.teacher}, {recipe.nfe} step", pixels)
    metadata |= network.file_metadata() | (marks or {})
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    write_safetensors(path, cast | (beside or {}), metadata)


def write_student(
    path: Path,
    student: Network,
    recipe: Recipe,
    tensors: dict[str, Tensor] | None = None,
    marks: dict[str, str] | None = None,
) -> None:
    """The student of a run, over an older one: a LoRA, or the network's weights (`tensors`)."""
    weights, dtype = tensors or student.file_tensors(), student.file_dtype
    write_weights(path, weights, recipe, student, dtype, marks=marks)
