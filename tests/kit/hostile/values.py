"""Values where others are meant, and files in which nothing is."""

from random import Random
from typing import Any

CONTROL = "a\x1b[31mred\x1b]0;owned\x07\r\nerror: fine"
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    10**5,
    10**9,
    2**63,
    10**30,
    -(10**30),
    0.5,
    1e-300,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "many",
    CONTROL,
    "\0",
    "\ud800",
    "x" * 1_000_000,
    "../../there/thesis.txt",
    "/dev/zero",
    [],
    [0],
    [-1, 10**9],
    [[[[]]]],
    list(range(200_000)),
    {},
    {"a": {"b": None}},
)
"""Values where others are meant."""

HOLLOW = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b"5",
    b'"x"',
    b"\xff\xfe\x00",
    b"\x00" * 100,
    b"{" * 100_000,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"NaN",
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"_class_name": "\x1b[31m"}',
    b'{"x": "' + b"x" * 5_000_000 + b'"}',
    b"[" + b"0," * 3_000_000 + b"0]",
)


def strange(random: Random) -> Any:
    return random.choice(STRANGE)


def plain(value: Any) -> Any:
    """What YAML can hold: it has no lone surrogates."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
