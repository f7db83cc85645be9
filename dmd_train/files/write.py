"""Reading and writing files so that nothing foreign runs and nothing half-written is left."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and the metadata. Raises UserError unless the file is whole."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path; it is relative to this folder.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}
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


def hash_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it.

    A reader sees the old file or the whole new one. Raises UserError if the folder refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
        )
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). Choose another output."
        ) from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path}: not written ({reason}). Make room, or choose another output; what was there "
            "before is as it was."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Atomically. Tensors may lie on any device."""
    whole = {key: value.detach().contiguous() for key, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(whole, temporary, metadata))


def write_latent(path: Path, latent: Tensor) -> None:
    """(N, 4, h, w), in the scale of the VAE, as ComfyUI's SaveLatent writes it."""
    marked = {"latent_tensor": latent, "latent_format_version_0": torch.empty(0)}
    write_safetensors(path, marked, {})


def write_text(path: Path, text: str) -> None:
    """Atomically, UTF-8."""
    write_atomically(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
