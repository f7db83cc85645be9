"""The one exception whose message is written for the person at the keyboard."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UserError(Exception):
    """Bad input. The message is one line: the file or key, its value, and the way out."""


def cut(value: object, length: int = 80) -> str:
    """A value out of somebody else's file, as much of it as a message has room for."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}..."


class OutOfMemory(UserError):
    """What was asked for does not fit this device."""


@contextmanager
def out_of_memory(message: str) -> Iterator[None]:
    """Inside, torch's own error of that kind becomes an OutOfMemory that says `message`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise OutOfMemory(message) from None
