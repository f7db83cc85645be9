"""An input of the command line, and the command carried out on it in a fork."""

import hashlib
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from kit.outcome import MEMORY, PATIENCE, PROOF, SECONDS, Outcome, unreadable


@dataclass
class Attempt:
    """An input and what it may leave. check: more to ask after a success, None where it is well."""

    arguments: list[str]
    leaves: tuple[str, ...] = ()
    check: Callable[[Path], str | None] = field(default=lambda folder: None)


Maker = Callable[[Random, Path], Attempt]
"""Puts an input's files into an empty folder."""


def tried(kind: str, make: Maker, seed: int, number: int, room: Path) -> Outcome:
    """Input `number` of a kind, in a process of its own. room: an empty folder."""
    here, there = room / "here", room / "there"
    for folder in (here, there, room / "tmp"):
        folder.mkdir()
    (there / "thesis.txt").write_text("years of work")
    attempt = make(Random(f"{seed} {kind} {number}"), here)
    before = _contents(room)
    code, seconds, memory = forked(attempt.arguments, here)
    said, out = (_text(room / name) for name in ("stderr", "stdout"))
    after = _contents(room)
    wrong = _wrong(code, seconds, memory, said, out) or _harm(code, before, after, attempt.leaves)
    if wrong is None and code == 0:
        wrong = attempt.check(here)
    return Outcome(kind, number, wrong, code, seconds, said, attempt.arguments)


def _wrong(code: int, seconds: float, memory: int, said: str, out: str) -> str | None:
    """What is wrong with how it ended, None where nothing is."""
    if code in (-signal.SIGALRM, -signal.SIGXCPU) or seconds > SECONDS:
        return "hangs"
    if memory > MEMORY:
        return f"{memory / 2**30:.1f} GB"
    if "Traceback" in said + out:
        return "traceback"
    if code not in (0, 2):
        return f"exit {code}"
    if code == 2:
        return unreadable(said.strip()) or (None if said.strip() else "0 lines")
    return next(filter(None, map(unreadable, (said + out).split("\n"))), None)


def _harm(
    code: int, before: dict[str, str], after: dict[str, str], leaves: tuple[str, ...]
) -> str | None:
    """What it did to files that are not its own, None where nothing."""
    if any(name.endswith(PROOF) for name in after):
        return "executed"
    allowed = tuple(f"here/{name}" for name in leaves)
    own = ("stdout", "stderr", "tmp/")
    for name in before.keys() | after.keys():
        if name.startswith(own) or before.get(name) == after.get(name):
            continue
        if not name.startswith(allowed or "/"):
            return f"{'changed' if name in before else 'left'} {name}"
    return None


def _contents(room: Path) -> dict[str, str]:
    """Every file below, by its name, and what is in it."""
    found = {}
    for path in room.rglob("*"):
        if path.is_symlink() or (not path.is_file() and not path.is_dir()):
            found[str(path.relative_to(room))] = "special"
        elif path.is_file() and path.parent != room:
            found[str(path.relative_to(room))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def forked(arguments: list[str], folder: Path) -> tuple[int, float, int]:
    """Exit code (negative: of a signal), CPU seconds and peak bytes of `dmd_train arguments`."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _become(arguments, folder)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10


def _become(arguments: list[str], folder: Path) -> None:
    """The command in this process, which ends here."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        handle = os.open(folder.parent / name, os.O_CREAT | os.O_WRONLY)
        os.dup2(handle, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    os.environ["TMPDIR"] = str(folder.parent / "tmp")
    tempfile.tempdir = None
    signal.alarm(PATIENCE)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # beyond what is asked, so that this machine lives on; a mapped file counts here, not there
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + 3 * MEMORY, own + 3 * MEMORY))
    code = 1
    try:
        sys.argv = ["dmd_train", *arguments]
        from dmd_train.terminal.commands import main

        main(arguments)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
