"""How an input of the corpus ended, and what it may take and say."""

import re
from typing import NamedTuple

SECONDS = 20
"""Of one processor, that an input may take."""
PATIENCE = 40
"""Seconds by the clock, for what hangs without computing: others compute on this machine too."""
MEMORY = 2 << 30
"""Bytes in memory, that an input may take; the engine and torch are in them."""

LONGEST = 2000
"""Characters of a line on stderr, paths and all."""

PROOF = "executed"
"""A file of this name is what hostile code would leave."""


class Outcome(NamedTuple):
    """How an input ended. wrong: in one phrase, None where it ended as it must."""

    kind: str
    number: int
    wrong: str | None
    code: int
    seconds: float
    said: str
    arguments: list[str]


def unreadable(text: str) -> str | None:
    """What is wrong with a text as a line for a person, None where nothing."""
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text):
        return "control characters"
    if len(text.splitlines()) > 1:
        return f"{len(text.splitlines())} lines"
    return f"a line of {len(text)} characters" if len(text) > LONGEST else None
