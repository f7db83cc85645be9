"""A run killed, or its disk full, at the n-th thing it does to its folder: in a fork of this one.

Kills and writes are the kernel's own. What Python does to files is known by its audit events.
"""

import json
import os
import re
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from dmd_train.errors import UserError
from dmd_train.files import write

Ending = Literal["kill", "torn", "full"]
"""kill: dead before the operation. torn: and what was being written is half there. full: no byte
can be written from there on."""

DONE, REFUSED, FAILED, KILLED = 0, 2, 1, 9

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.fsync"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Operations:
    """Operations on the files of `folder`, counted; the process ends at number `last`."""

    def __init__(self, folder: Path, last: int, ending: Ending) -> None:
        self.folder, self.last, self.ending = str(folder), last, ending
        self.done: list[str] = []
        self.written: tuple[Path, int] | None = None
        """The file that is open, and how long it was before."""

    def watch(self) -> None:
        """Look at everything from here on: of this process, for good."""
        fsync, save_file = os.fsync, write.save_file

        def audited_fsync(handle: int) -> None:
            sys.audit("os.fsync", os.readlink(f"/proc/self/fd/{handle}"))
            fsync(handle)

        def save_file_beside(
            tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]
        ) -> None:
            """safetensors writes a file of its own beside it and renames that, in Rust."""
            beside = path.with_name(".tmpAb12Cd")
            if self.ending != "full":
                beside.write_bytes(bytes(1000))
            save_file(tensors, path, metadata)
            if self.ending != "full":
                beside.unlink()

        os.fsync, write.save_file = audited_fsync, save_file_beside
        sys.addaudithook(self._look)

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not flags & WRITES and not (mode and set(mode) & set("wax+")):
                return
            event = "reopen" if mode and set("r+") <= set(mode) else event
        elif event not in CHANGES:
            return
        path = str(arguments[0])
        if path.startswith(self.folder):
            self._next(event, Path(path))

    def _next(self, event: str, path: Path) -> None:
        if len(self.done) == self.last:
            self._end()
        self.done.append(f"{event} {path}")
        size = path.stat().st_size if path.exists() else 0
        self.written = (path, size) if event == "open" else None

    def _end(self) -> None:
        self.last = -1
        if self.ending == "full":
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
            return
        if self.written and self.ending == "torn":
            path, before = self.written
            os.truncate(path, (before + path.stat().st_size) // 2)
        os._exit(KILLED)


def forked(work: Callable[[], object]) -> int:
    """How `work` ended in a fork: DONE, REFUSED by one line, KILLED, or FAILED."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = FAILED
    try:
        work()
        code = DONE
    except UserError as error:
        code = FAILED if "\n" in str(error) else REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(work: Callable[[], object], folder: Path, last: int, ending: Ending) -> int:
    """How `work` ended, with `folder` cut off at operation number `last`."""

    def watched() -> None:
        Operations(folder, last, ending).watch()
        work()

    return forked(watched)


def points_of(done: list[str]) -> list[tuple[int, Ending]]:
    """Every operation with every ending that is one there: written is what was opened for it."""
    opened = [number for number, operation in enumerate(done) if operation.startswith("open")]
    again = [number for number, operation in enumerate(done) if operation.startswith("reopen")]
    return [
        *((number, "kill") for number in range(len(done))),
        *((number + 1, "torn") for number in opened if number + 1 < len(done)),
        *((number, "full") for number in opened + again),
    ]


def operations(work: Callable[[], object], folder: Path, listed: Path) -> list[str]:
    """The operations of `work` on `folder`, by way of a file `listed`."""

    def watched() -> None:
        all_of_them = Operations(folder, -1, "kill")
        all_of_them.watch()
        work()
        listed.write_text(json.dumps(all_of_them.done))

    assert forked(watched) == DONE
    done: list[str] = json.loads(listed.read_text())
    return done


def state(folder: Path) -> tuple[tuple[str, bytes], ...]:
    """What lies in a run's folder, but for seconds and the random part of temporary names."""
    found = [
        (
            re.sub(r"-[0-9a-f]{16}", "", str(path.relative_to(folder))),
            re.sub(rb'"seconds": [^}]*', b"", path.read_bytes()) if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    ]
    return tuple(sorted(found))


def contents(folder: Path) -> dict[str, Any]:
    """What lies in a run's folder: tensors with what the file says, rows without seconds, bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): _content(path) for path in kept}


def _content(path: Path) -> Any:
    raw = path.read_bytes()
    match path.suffix:
        case ".safetensors" if not path.name.startswith("."):
            end = 8 + int.from_bytes(raw[:8], "little")
            return json.loads(raw[8:end]), raw[end:]
        case ".jsonl":
            rows = [json.loads(line) for line in raw.splitlines()]
            return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        case ".html":
            return re.sub(rb'"seconds": [^}]*', b"", raw)
        case _:
            return raw
