"""Names of files and folders: one rule, for every system that they may be copied to."""

import pytest

from dmd_train.files.names import is_name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".hidden", "x.", "x ", " x", "a/b", "a\\b", "C:x", "a*", "what?"),
        *("CON", "con", "nul.txt", "Com1", "COM¹", "lpt9.tar.gz", "aux .x", "CONIN$"),
        *("x" * 201, "é" * 101, "a\0", "a\nb", "\x1b[31m", "\ud800", "gpj.\u202ename"),
    ],
)
def test_what_some_system_takes_for_something_else_is_no_name(name: str) -> None:
    assert not is_name(name)


@pytest.mark.parametrize(
    "name", ["a", "both doors", "Läufe-2.1", "雪", "x" * 200, "console", "a(1)"]
)
def test_what_every_system_takes_is_a_name(name: str) -> None:
    assert is_name(name)
