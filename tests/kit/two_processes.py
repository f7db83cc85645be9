"""A command in two processes of one run: forked, without the imports that a launcher costs."""

import os
import socket
import sys
import traceback
from contextlib import closing
from pathlib import Path

from accelerate import PartialState
from kit.command_line import run_command


def in_two_processes(output: Path, *arguments: object, **environment: str) -> tuple[int, str]:
    """The worse exit code, and what both said, by way of the file `output`.

    environment: beside what torchrun sets.
    """
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    launched = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    children = []
    for rank in "01":
        child = os.fork()
        if child == 0:
            ranks = {"RANK": rank, "LOCAL_RANK": rank}
            _become(output, arguments, address | launched | ranks | environment)
        children.append(child)
    ended = [os.waitpid(child, 0)[1] for child in children]
    return max(map(abs, map(os.waitstatus_to_exitcode, ended))), output.read_text()


def _become(output: Path, arguments: tuple[object, ...], environment: dict[str, str]) -> None:
    """The command in this process, which ends here."""
    code = 1
    try:
        sys.stdout = sys.stderr = output.open("a", buffering=1)
        os.environ |= environment
        PartialState._reset_state()  # a library may have made that of one process
        code = run_command(*arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
