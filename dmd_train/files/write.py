"""Files that are there whole or not at all: written beside their place, then renamed."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from .mark import MARK_KEY, mark_of

TEMPORARY = re.compile(r"\..+-[0-9a-f]{16}(\.\w+)?|\.tmp\w{6}")
"""Names of files that are being written: ours, and safetensors' own beside them."""


def is_temporary(path: Path) -> bool:
    """Whether it is a file that is being written, or was when its writer was killed."""
    return bool(TEMPORARY.fullmatch(path.name)) and path.is_file()


def sweep(folder: Path) -> None:
    """Drop what kills left half written in a folder that nobody else writes into."""
    for path in folder.glob(".*"):
        if is_temporary(path):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Inside, nobody else who asks writes into a folder, and what kills left there is gone.

    Raises UserError where somebody does, and where nobody can.
    """
    require_folder(folder)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder}: another process writes into this folder. Wait for it, or choose another."
        ) from None
    except OSError as error:
        raise _refused(folder, error) from None
    with held:
        sweep(folder)
        yield


def gone(folder: Path) -> UserError:
    """What to say of a folder that was taken away: a write would make half of it anew."""
    return UserError(
        f"{folder}: was deleted or moved while it was written to. Put it back, or start again."
    )


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, on the disk too. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush_folder(path.parent)


def require_folder(folder: Path) -> None:
    """Make a folder where there is none. Raises UserError where it cannot be."""
    try:
        make_folder(folder)
    except OSError as error:
        raise _refused(folder, error) from None


def _refused(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror}). Choose another output.")


def flush_file(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until names that were added or replaced in a folder are on the disk.

    Windows opens no folders and some network drives flush none: they do so in their own time.
    """
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it.

    A reader sees the old file or the whole new one, after a power failure too. Raises UserError if
    the folder refuses.
    """
    temporary = path.parent / f".{path.stem}-{secrets.token_hex(8)}{path.suffix}"
    try:
        make_folder(path.parent)
        # the umask applies by itself: to ask for it is to change it, for all threads
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    except OSError as error:
        raise _refused(path, error) from None
    mode = os.fstat(handle).st_mode
    os.close(handle)
    try:
        write(temporary)
        flush_file(temporary)
        temporary.chmod(mode)  # safetensors puts a file in its place that is this user's alone
        temporary.replace(path)
        flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        if not path.parent.exists():
            raise gone(path.parent) from None
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path}: not written ({reason}). Make room, or choose another output; what was there "
            "before is as it was."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Tensors, on any device, and what the file says of itself, its mark included. Atomic.

    The same tensors and metadata give the same bytes.
    """
    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    said = metadata | {MARK_KEY: mark_of(whole)}

    def write(temporary: Path) -> None:
        save_file(whole, temporary, said)
        _sort_metadata(temporary)

    write_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """Put a file's metadata in the order of its names: safetensors has it in one of chance."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def write_latent(path: Path, latent: Tensor) -> None:
    """Latents (N, C, h, w) in the scale of the VAE, as ComfyUI keeps them in files. Atomic."""
    marked = {"latent_tensor": latent, "latent_format_version_0": torch.empty(0)}
    write_safetensors(path, marked, {})


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8. Atomic."""
    write_atomically(path, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
