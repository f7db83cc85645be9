"""An input of the command line, and the command carried out on it in a fork."""

import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

SECONDS = 20
"""Of one processor, that an input may take."""
PATIENCE = 40
"""Seconds by the clock, for what hangs without computing: others compute on this machine too."""
MEMORY = 2 << 30
"""Bytes in memory, that an input may take; the engine and torch are in them."""

PROOF = "executed"
"""A file of this name is what hostile code would leave."""


@dataclass
class Attempt:
    """An input and what it may leave. check: more to ask after a success, None where it is well."""

    arguments: list[str]
    leaves: tuple[str, ...] = ()
    check: Callable[[Path], str | None] = field(default=lambda folder: None)


Maker = Callable[[Random, Path], Attempt]
"""Puts an input's files into an empty folder."""


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
