"""metrics.jsonl and the trackers, and the watch for non-finite values."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..method.processes import Processes
from .folder import RunFolder
from .trackers import Trackers

LOG_EVERY = 10
"""Student updates between two looks at the losses: one host-device sync for all of them."""


class Journal:
    """A run's lines of metrics.jsonl, written LOG_EVERY steps at a time."""

    def __init__(self, run: RunFolder, processes: Processes) -> None:
        self.run, self.processes = run, processes
        self.trackers = Trackers(run.config, run.path)
        self.waiting: list[tuple[int, dict[str, Tensor]]] = []
        self.since = time.monotonic()

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        self.waiting.append((step, values))
        if len(self.waiting) >= LOG_EVERY:
            self.flush()

    def flush(self) -> None:
        """What waits is written. Raises UserError on a value that is not finite, after what is."""
        if self.processes.is_main:
            self.run.require_there()
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        flat = torch.stack([value for _, values in waiting for value in values.values()])
        numbers = iter(self.processes.mean(flat).tolist())
        seconds = (time.monotonic() - self.since) / len(waiting)
        self.since = time.monotonic()
        rows = [
            {"step": step, **{name: next(numbers) for name in values}, "seconds": seconds}
            for step, values in waiting
        ]
        for i, row in enumerate(rows):
            bad = next((name for name, number in row.items() if not math.isfinite(number)), None)
            if bad:
                self._log(rows[:i])
                raise UserError(
                    f"{self.run.path}: {bad.replace('/', ': ')} became {row[bad]} at step "
                    f"{row['step']}. The last checkpoint is kept; lower learning_rate and go on."
                )
        self._log(rows)

    def _log(self, rows: list[dict[str, Any]]) -> None:
        if self.processes.is_main:
            self.run.log(rows)
            for row in rows:
                self.trackers.log(row)
