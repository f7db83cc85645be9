"""The command line in this process, and short runs of the embedded teacher for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dmd_train.terminal.commands import main

SHORT: dict[str, Any] = {
    "teacher": "digits",
    "preset": "digits-one-step",
    "steps": 40,
    "batch_size": 4,
    "pairs": 20,
    "pair_batch_size": 4,
    "pair_steps": 2,
    "critic_updates": 2,
    "checkpoint_every": 10,
    "sample_every": 20,
}
"""A run.yaml but for its output."""


class Outcome(NamedTuple):
    """What a command ended with and said."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
"""The fixture `dmd`."""

WriteRun = Callable[..., Path]
"""The fixtures `write_run` and `write_sd_run`."""


def run_command(*arguments: object) -> int:
    """Exit code of `python -m dmd_train` with these arguments, in this process."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def refused(outcome: Outcome, *words: object) -> None:
    """Asserts exit code 2 and one line that says all of `words`."""
    code, out, err = outcome
    assert code == 2, out + err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ") and "Traceback" not in out + err
    for word in words:
        assert str(word) in err, err


def one_line(text: str) -> str:
    """The text as it was before a terminal's width broke it."""
    return " ".join(text.split())
