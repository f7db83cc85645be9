"""The values of metrics.jsonl over student updates: read as the file grows, thinned to be drawn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .folder import read_row

PART = 1 << 20
"""Bytes read at a time: other threads, one of them training, wait for the parsing of a part."""

Values = NDArray[np.float64]


class Series:
    """Columns of a metrics.jsonl: `values[name]` (N,), NaN where a row has none, over `steps`."""

    def __init__(self, metrics: Path) -> None:
        self.metrics = metrics
        self._begin()

    def _begin(self) -> None:
        self.steps: NDArray[np.int64] = np.empty(0, np.int64)
        self.values: dict[str, Values] = {}
        self._read, self._file = 0, -1

    def read(self) -> None:
        """Take up whole lines that were added; all of them where the file is another by now."""
        if not self.metrics.exists():
            return self._begin()
        with self.metrics.open("rb") as file:
            if self._file != (number := self.metrics.stat().st_ino):
                self._begin()
                self._file = number
            file.seek(self._read)
            while part := file.read(PART) + file.readline():
                whole = part[: part.rfind(b"\n") + 1]  # the last line may be being written
                self._read += len(whole)
                self._add(rows_of(whole))
                if len(whole) < len(part):
                    break

    def _add(self, rows: list[dict[str, Any]]) -> None:
        before, steps = len(self.steps), [row["step"] for row in rows]
        self.steps = np.concatenate([self.steps, np.array(steps, np.int64)])
        for name in dict.fromkeys(name for row in rows for name in row):
            if name != "step":
                added = np.array([row.get(name, np.nan) for row in rows], np.float64)
                known = self.values.get(name, np.full(before, np.nan))
                self.values[name] = np.concatenate([known, added])
        for name, known in self.values.items():
            missing = len(self.steps) - len(known)
            if missing:
                self.values[name] = np.concatenate([known, np.full(missing, np.nan)])


def rows_of(lines: bytes) -> list[dict[str, Any]]:
    """The rows among lines of metrics.jsonl; what is damaged is left out.

    All at once where all are whole: twice as fast, and a long run has a hundred thousand.
    """
    each = lines.splitlines()
    try:
        rows = json.loads(b"[" + b",".join(each) + b"]")
        if len(rows) == len(each) and all(map(_is_row, rows)):
            return list(rows)
    except (ValueError, RecursionError):
        pass
    found = (read_row(line.decode("utf-8", "replace")) for line in each)
    return [row for row in found if row]


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and {float, int}.issuperset(map(type, row.values()))
    )


def thinned(
    steps: NDArray[np.int64], values: dict[str, Values], columns: int
) -> tuple[NDArray[np.int64], dict[str, Values]]:
    """At most two points for each of `columns` pixels: the least and the greatest value there.

    steps (N,) -> (M,), each of values (N,) -> (M,), M <= 2 * columns. As they are where N is less.
    """
    count = len(steps)
    if count <= 2 * columns:
        return steps, values
    first = np.linspace(0, count, columns, endpoint=False).astype(np.int64)
    last = np.append(first[1:], count) - 1
    kept = {}
    for name, value in values.items():
        ends = np.stack([np.fmin.reduceat(value, first), np.fmax.reduceat(value, first)])
        falls = value[first] > value[last]
        kept[name] = np.where(falls, ends[::-1], ends).T.ravel()
    return np.stack([steps[first], steps[last]]).T.ravel(), kept
