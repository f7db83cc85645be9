"""Prompts: a list from a text file, encoded once into a folder."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError, shown
from ..files.shards import make_shards
from ..files.text import read_text

if TYPE_CHECKING:
    from ..networks.text import TextEncoder

SHIPPED = Path(__file__).with_name("prompts.txt")
MOST_TEXT = 1 << 28
"""Bytes of a list of prompts: some millions of them."""

LONGEST = 10_000
"""Characters of a prompt: text encoders read 77 tokens, language models some hundred."""

BROKEN = re.compile("[\0\ud800-\udfff]")
"""NUL, and half a character."""

SHARD = 64
"""Prompts encoded at a time."""

ON_DISK = 4 << 30
"""Bytes of encoded prompts up to which they are kept on disk; a longer list is encoded live."""


WAY_OUT = "Write one prompt a line."


def read_prompts(file: str | Path | None) -> list[str]:
    """Prompts of a file, one a line, each once; None: the shipped ones. Raises UserError."""
    path = Path(file or SHIPPED)
    prompts = prompts_in(read_text(path, MOST_TEXT, WAY_OUT), str(path))
    if not prompts:
        raise UserError(f"{path}: holds no prompts. Write one a line, or leave `prompts` out.")
    return prompts


def prompts_in(text: str, source: str) -> list[str]:
    """Prompts, one a line, each once; blank lines and blanks around a prompt do not count.

    Raises UserError, which begins with `source`, where one cannot be encoded.
    """
    prompts = list(dict.fromkeys(filter(None, map(str.strip, text.splitlines()))))
    for prompt in prompts:
        require_prompt(prompt, source)
    return prompts


def require_prompt(prompt: str, source: str) -> None:
    """Refusal, a UserError that begins with `source`, of a text that no encoder can be told."""
    if len(prompt) > LONGEST:
        raise UserError(
            f"{source}: the prompt {shown(prompt[:LONGEST])} has {len(prompt)} characters, more "
            f"than {LONGEST}. {WAY_OUT}"
        )
    if BROKEN.search(prompt):
        raise UserError(f"{source}: the prompt {shown(prompt)} is no text in UTF-8. {WAY_OUT}")


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
