"""What the commands share: the progress bar, and the stop that is asked for by a signal."""

import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..distil import StepReport
from ..errors import printable
from ..method.processes import Processes
from ..prepare import Doing
from ..run.folder import RunFolder
from ..run.journal import LOG_EVERY

console = Console(markup=False)

STOPPED = 128 + signal.SIGINT
"""Exit code of a process whose run was stopped by another."""


HANG_UP = getattr(signal, "SIGHUP", None)
"""A terminal that is closed; not on Windows."""


def say(text: str) -> None:
    """A line for the user, however long: paths and commands are copied from it."""
    console.print(printable(text), soft_wrap=True)


class StopRequest:
    """Ctrl-C, SIGTERM and SIGHUP become a flag, looked at between two steps. A second one kills."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._on_terminal = console.is_terminal
        asked = {signal.SIGINT, signal.SIGTERM}
        if HANG_UP and signal.getsignal(HANG_UP) != signal.SIG_IGN:  # nohup has it ignored
            asked.add(HANG_UP)
        self._before = {number: signal.signal(number, self._ask) for number in asked}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if number != HANG_UP:
            signal.signal(number, self._before[self.signal])
        elif self._on_terminal:  # gone. A shell sends this twice, so that it never kills
            console.quiet = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit(self) -> NoReturn:
        """Exit with the code of the signal that asked; another process's is taken for Ctrl-C."""
        raise typer.Exit(128 + (self.signal or signal.SIGINT))


def bar() -> Progress:
    """A progress bar with counts, time so far and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextmanager
def told(stop: StopRequest) -> Iterator[Callable[[Doing], None]]:
    """A bar for each part of a preparation. Exits once a stop is asked for."""
    with bar() as progress:
        tasks: dict[str, TaskID] = {}

        def tell(doing: Doing) -> None:
            what, done, total, note = doing
            if note:
                say(note)
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total, note="")
            progress.update(tasks[what], completed=done)
            if stop.signal and done < total:
                say(f"{what}: {done} of {total} kept; the same command goes on.")
                stop.exit()

        yield tell


def watch(
    reports: Generator[StepReport], run: RunFolder, processes: Processes, stop: StopRequest
) -> bool:
    """Draw the bar until the reports end or a stop is asked for; whether it was."""
    with bar() as progress, closing(reports):
        task = progress.add_task("distil", total=run.config.steps, note="")
        for report in reports:
            if run.notes:
                for note in run.notes:
                    say(note)
                run.notes.clear()
                progress.reset(task, completed=report.step)
            if report.step % LOG_EVERY == 0:
                progress.update(task, note=report.losses())
            progress.update(task, completed=report.step)
            if processes.any(stop.signal is not None):
                return report.step < run.config.steps
    return False
