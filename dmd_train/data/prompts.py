"""Prompts: a list from a text file, encoded once into a folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from ..files.shards import make_shards

if TYPE_CHECKING:
    from ..networks.text import TextEncoder

SHIPPED = Path(__file__).with_name("prompts.txt")
SHARD = 64
"""Prompts encoded at a time."""

ON_DISK = 4 << 30
"""Bytes of encoded prompts up to which they are kept on disk; a longer list is encoded live."""


def read_prompts(file: str | Path | None) -> list[str]:
    """Prompts of a file, one a line, each once; None: the shipped ones. Raises UserError."""
    path = Path(file or SHIPPED)
    prompts = prompts_in(read_text(path))
    if not prompts:
        raise UserError(f"{path}: holds no prompts. Write one a line, or leave `prompts` out.")
    return prompts


def read_text(path: Path) -> str:
    """A file's text. Raises UserError for what is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8. Write one prompt a line.") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Write one prompt a line into it.") from None
    if "\0" in text:
        raise UserError(f"{path}: not a text file. Write one prompt a line.")
    return text


def prompts_in(text: str) -> list[str]:
    """Prompts, one a line, each once; blank lines and blanks around a prompt do not count."""
    return list(dict.fromkeys(filter(None, map(str.strip, text.splitlines()))))


def too_long(prompts: list[str], encoder: "TextEncoder", file: str | None) -> str | None:
    """A warning about prompts that the text encoder cuts, None where there are none."""
    over = encoder.too_long(prompts)
    if not over:
        return None
    return (
        f"{file or SHIPPED}: {len(over)} of {len(prompts)} prompts have more than 77 tokens; what "
        f"is beyond is not read. The first: {prompts[over[0]][:60]!r}..."
    )


def fits_on_disk(prompts: list[str], encoder: "TextEncoder") -> bool:
    one = encoder.encode([""])
    return len(prompts) * sum(2 * value.numel() for value in one.values()) <= ON_DISK


def encode_prompts(
    folder: Path, prompts: list[str], encoder: "TextEncoder", origin: str
) -> Iterator[int]:
    """Encode into `folder`, in float16, yielding how many there are. Goes on where it stopped."""

    def make(rows: range) -> dict[str, Tensor]:
        with torch.no_grad():
            text = encoder.encode(prompts[rows.start : rows.stop])
        return {key: value.half().cpu() for key, value in text.items()}

    yield from make_shards(folder, len(prompts), SHARD, origin, make)
