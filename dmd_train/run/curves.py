"""The curves of a run: every value of metrics.jsonl over its student updates."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files.write import write_atomically


def save_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """A panel for each value of metrics.jsonl, over student updates; nothing where none are."""
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if name not in ("step", "seconds")]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        told = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*told, strict=True), linewidth=0.8)
        axis.set(title=name.replace("/", ": ").replace("_", " "), xlabel="student updates")
        axis.set_yscale("log")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
