"""Weights from a file that anybody may have made: safetensors, or a pickle without code."""

import hashlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .mark import MARK_KEY, mark_of

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
HEADER = 1 << 24
"""Bytes of a safetensors header that are read; ten thousand weights need one megabyte."""
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def peek(path: Path) -> tuple[Shapes, dict[str, str]]:
    """Shapes and metadata without the weights: a header, or memory that is mapped, not read."""
    if path.suffix.lower() in PICKLES:
        return {key: tuple(value.shape) for key, value in _read_pickle(path).items()}, {}
    with _opened(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
        return shapes, file.metadata() or {}


def read_weights(path: Path, *prefixes: str) -> tuple[Weights, dict[str, str]]:
    """Tensors on the CPU, and the metadata (a pickle has none). Raises UserError, one line.

    prefixes: only weights whose names start with one of them; of safetensors the rest is not read.
    """
    if path.suffix.lower() in PICKLES:
        weights = {k: v for k, v in _read_pickle(path).items() if k.startswith(prefixes or "")}
        for key, value in weights.items():
            if value.nbytes > value.untyped_storage().nbytes():
                raise UserError(
                    f"{path}: {key} repeats its values, to {value.nbytes} bytes. Get a "
                    ".safetensors file of the same weights."
                )
        return weights, {}
    return read_safetensors(path, *prefixes)


def read_safetensors(path: Path, *prefixes: str) -> tuple[Weights, dict[str, str]]:
    """Tensors on the CPU, and the metadata. Raises UserError unless the file is whole.

    A file with a mark that is read in full is held against it; a part, or no mark, goes unchecked.
    """
    with _opened(path) as file:
        wanted = [key for key in list(file.keys()) if key.startswith(prefixes or "")]
        tensors, metadata = {key: file.get_tensor(key) for key in wanted}, file.metadata() or {}
    mark = metadata.pop(MARK_KEY, None)
    if mark and not prefixes and mark != mark_of(tensors):
        raise UserError(
            f"{path}: its tensors are not those that were written: bits have flipped, or another "
            f"program changed them and kept the mark {MARK_KEY}. Copy it again."
        )
    return tensors, metadata


def require_file(path: Path) -> None:
    """Raises UserError for what is no file: nothing, a folder, a pipe or a device without end; and
    for one that cannot be read."""
    if os.path.isfile(path):
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}). Copy it to where it can."
            ) from None
        return
    if not os.path.exists(path):  # also of a name too long, and of a link to itself
        raise UserError(f"{path}: no such file. Check the path; it is relative to this folder.")
    what = "a folder" if os.path.isdir(path) else "a pipe or a device"
    raise UserError(f"{path}: {what}, not a file of weights. Give the file itself.")


def hash_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal. Raises UserError for what is none."""
    require_file(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file. Raises UserError, in the end too, unless it is whole."""
    require_file(path)
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
    if HEADER < length <= path.stat().st_size:
        raise UserError(
            f"{path}: its header has {length} bytes, more than {HEADER}. "
            "Save the weights again, without what is written beside them."
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        # asked only now: the length of a header, which comes first, may begin with the same bytes
        with path.open("rb") as raw:
            start = raw.read(2)
        if start[:1] == b"\x80" or start == b"PK":
            raise UserError(
                f"{path}: a pickled PyTorch file, which may run code when loaded. "
                "Convert it to .safetensors first."
            ) from None
        raise UserError(
            f"{path}: not a whole safetensors file ({error}). Download or copy it again."
        ) from None


def _read_pickle(path: Path) -> Weights:
    """A state dict by torch's unpickler, which builds tensors and containers and runs nothing."""
    require_file(path)
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
        is_zip = start == b"PK"
        if is_zip:
            _require_stored(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are old, above our one line
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
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
    is_weights = all(isinstance(k, str) and _is_plain(v) for k, v in entries.items())
    if not isinstance(loaded, dict) or not is_weights:
        keys = ", ".join(str(key) for key in list(entries)[:3])
        what = "an optimiser's state" if "param_groups" in keys else "not a model's state dict"
        raise UserError(
            f"{path}: {what} (keys such as {keys or 'none'}). Give a file of model weights."
        )
    return loaded


def _require_stored(path: Path) -> None:
    """Raises ValueError for an archive that would grow: torch stores its weights as they are."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError


def _is_plain(value: object) -> bool:
    """Whether this is a tensor whose values are in the file, as they are."""
    if not isinstance(value, Tensor) or value.is_quantized:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"
