"""Files that are there whole or not at all: written beside their place, then renamed."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it.

    A reader sees the old file or the whole new one. Raises UserError if the folder refuses.
    """
    temporary = path.parent / f".{path.stem}-{secrets.token_hex(8)}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the umask applies by itself: to ask for it is to change it, for all threads
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). Choose another output."
        ) from None
    mode = os.fstat(handle).st_mode
    os.close(handle)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # safetensors puts a file in its place that is this user's alone
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path}: not written ({reason}). Make room, or choose another output; what was there "
            "before is as it was."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Tensors, on any device, and what the file says of itself. Atomic."""
    whole = {key: value.detach().contiguous() for key, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(whole, temporary, metadata))


def write_latent(path: Path, latent: Tensor) -> None:
    """Latents (N, C, h, w) in the scale of the VAE, as ComfyUI keeps them in files. Atomic."""
    marked = {"latent_tensor": latent, "latent_format_version_0": torch.empty(0)}
    write_safetensors(path, marked, {})


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8. Atomic."""
    write_atomically(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
