"""Weights from a file that anybody may have made: safetensors, or a pickle without code."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .write import read_safetensors

Shapes = dict[str, tuple[int, ...]]

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def peek(path: Path) -> tuple[Shapes, dict[str, str]]:
    """Shapes and metadata without the weights: a header, or memory that is mapped, not read."""
    if path.suffix.lower() in PICKLES:
        return {key: tuple(value.shape) for key, value in _read_pickle(path).items()}, {}
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
            return shapes, file.metadata() or {}
    except (OSError, SafetensorError):
        read_safetensors(path)  # raises, and says what is wrong with the file
        raise


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and the metadata (a pickle has none). Raises UserError, one line."""
    if path.suffix.lower() in PICKLES:
        return _read_pickle(path), {}
    return read_safetensors(path)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """A state dict by torch's unpickler, which builds tensors and containers and runs nothing."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path; it is relative to this folder.")
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        raise UserError(f"{path}: empty, it holds no weights. Download or copy it again.")
    if start != b"PK" and start[:1] != b"\x80":
        raise UserError(f"{path}: not a PyTorch file (a web page?). Download it again.")
    if TORCH < (2, 6):  # CVE-2025-32434: weights_only ran code
        raise UserError(f"{path}: pickles need torch 2.6 to be safe. Convert it to .safetensors.")
    try:
        # only the zip format can be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=start == b"PK")
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds code or objects beside tensors, and was not opened. "
            "Get a .safetensors file of the same weights."
        ) from None
    except Exception:  # a cut file fails in whatever the unpickler happened to be doing
        raise UserError(f"{path}: not a whole PyTorch file. Download or copy it again.") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    entries = loaded if isinstance(loaded, dict) else {}
    is_weights = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entries.items())
    if not isinstance(loaded, dict) or not is_weights:
        keys = ", ".join(str(key) for key in list(entries)[:3])
        what = "an optimiser's state" if "param_groups" in keys else "not a model's state dict"
        raise UserError(
            f"{path}: {what} (keys such as {keys or 'none'}). Give a file of model weights."
        )
    return loaded
