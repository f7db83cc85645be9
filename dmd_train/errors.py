"""The one exception whose message is written for the person at the keyboard."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LONGEST = 1000
"""Characters of a message; a longer one loses its middle, not its subject or the way out."""


def printable(text: str) -> str:
    """A text as a terminal may show it: what would move its cursor is written out, as \\x1b."""
    return "".join(c if _stays_put(c) else repr(c)[1:-1] for c in text)


def _stays_put(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"  # wide spaces, too


def one_line(text: str) -> str:
    """A message that is printable and of a length that is read."""
    if len(text) > LONGEST:
        text = f"{text[:650]} ... {text[-300:]}"
    return printable(text)[: 2 * LONGEST]  # a character may become ten


def shown(value: object) -> str:
    """A value within a message: its repr, cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


class UserError(Exception):
    """Bad input. The message is one line: the file or key, its value, and the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class OutOfMemory(UserError):
    """What was asked for does not fit this device."""


@contextmanager
def out_of_memory(message: str) -> Iterator[None]:
    """Inside, every error of that kind becomes an OutOfMemory that says `message`."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise OutOfMemory(message) from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # torch has no class for a CPU's
            raise
        raise OutOfMemory(message) from None
