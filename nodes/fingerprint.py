"""A short name for what a MODEL is, or a CONDITIONING: the same for the same, on any machine."""

import hashlib
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

SAMPLED = 4096
"""Elements of a weight that its model's name depends on."""

DIFFUSION_MODEL = "diffusion_model."
"""What a MODEL puts before the names of its network's weights."""


def digest(value: Any, most: int | None = None) -> str:
    """SHA-256 of everything the value is made of, hexadecimal. most: elements of each tensor."""
    sha = hashlib.sha256()
    for part in _parts(value, most):
        sha.update(part)
    return sha.hexdigest()


def model_fingerprint(model: ModelPatcher) -> str:
    """A name of the MODEL's weights, the LoRAs and merges on them, its schedule, other patches.

    Made from a strided sample of each weight as it is before patches, wherever it is loaded.
    """
    with model.use_ejected():
        weights = dict(model.model.diffusion_model.named_parameters())
    kept = {key: backup.weight for key, backup in model.backup.items()} | {
        key: backup[0] for key, backup in model.hook_backup.items()
    }
    schedule = model.get_model_object("model_sampling")
    return digest(
        [
            {key: kept.get(DIFFUSION_MODEL + key, weight) for key, weight in weights.items()},
            {key: value for key, value in model.patches.items() if key.startswith(DIFFUSION_MODEL)},
            [kind.__qualname__ for kind in type(schedule).__mro__],
            getattr(schedule, "sigmas", None),
            [sorted(model.object_patches), sorted(model.injections)],
            model.model_options,
        ],
        SAMPLED,
    )


def _parts(value: Any, most: int | None) -> Iterator[bytes]:
    match value:
        case QuantizedTensor():
            yield from _parts(value.dequantize(), most)
        case Tensor():
            yield f"{value.dtype} {tuple(value.shape)}".encode()
            flat = value.detach().reshape(-1)
            flat = flat[:: -(-len(flat) // most) or 1] if most else flat
            yield flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        case dict():
            yield f"{{{len(value)}".encode()
            for key in sorted(value, key=repr):
                yield repr(key).encode()
                yield from _parts(value[key], most)
        case list() | tuple():
            yield f"[{len(value)}".encode()
            for item in value:
                yield from _parts(item, most)
        case None | bool() | int() | float() | str():
            yield repr(value).encode()
        case FunctionType():
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            yield f"{value.__module__}.{value.__qualname__} {list(_settings(cells))}".encode()
        case _:
            yield type(value).__qualname__.encode()
            yield from _parts(getattr(value, "weights", None), most)  # of a LoRA and its like


def _settings(cells: Any) -> Iterator[float]:
    """The strengths that a patch is closed over. What else it holds may change while it samples."""
    match cells:
        case float():
            yield cells
        case dict():
            yield from _settings(list(cells.values()))
        case list() | tuple():
            for cell in cells:
                yield from _settings(cell)
