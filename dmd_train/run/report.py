"""report.html: a run in one file that anybody can open, without a network and without us.

The page is drawn by js/panel/panel.js, which draws the same in ComfyUI. It gets its data as JSON
and makes text nodes of it, so that no name and no prompt is ever read as HTML.
"""

import json
import math
import os
import platform
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import __version__
from ..config import Config
from ..files.write import write_text
from ..presets import PRESETS
from .folder import RunFolder
from .series import Series, Values, thinned

COLUMNS = 2000
"""Pixels that the curves of a report are kept for: one can zoom in some three times."""

MOST_PICTURES, MOST_BYTES = 100, 32 << 20
"""Of a report: more are thinned evenly. All of them stay in samples/."""

LOSSES, NORMS, RATE, OTHERS = "losses", "gradient norms", "learning rate", "other figures"
CURVES = {
    "student/distribution_matching": (LOSSES, "distribution matching (shows no progress)"),
    "student/regression": (LOSSES, "student's regression on pairs"),
    "student/adversarial": (LOSSES, "student's adversarial"),
    "critic/denoising": (LOSSES, "critic's denoising"),
    "critic/adversarial": (LOSSES, "critic's adversarial"),
    "student/gradient_norm": (NORMS, "student"),
    "critic/gradient_norm": (NORMS, "critic"),
}
"""Names in metrics.jsonl -> the chart they are drawn in, and what they are called there."""

PATHS = ("teacher", "prompts", "images", "output", "decoder")
"""Settings of which a page names the last part alone: it may be sent to somebody."""

PANEL = "panel"
INSTALLED = Path(__file__).parents[1] / PANEL
PAGE = INSTALLED if INSTALLED.exists() else Path(__file__).parents[2] / "js" / PANEL
"""The page's scripts: ComfyUI serves them from js/, and an installed package has them within."""


def write_report(run: RunFolder) -> Path:
    """The report of a run as it stands. Atomic. Raises UserError if the disk refuses."""
    series = Series(run.metrics)
    series.read()
    data = described(run.path, run.config, series, COLUMNS)
    pictures = picture_files(run.samples)
    shown = _fewer(pictures)
    data["pictures"] = [{"step": step, "src": _embedded(pictures[step])} for step in shown]
    data["pictures_drawn"] = len(pictures)
    data["facts"] = {"hardware": _hardware(run.config), "versions": _versions()}
    data["time"] = data.pop("time")  # the last: it is what no two runs share
    write_text(run.report, page(data))
    return run.report


def page(data: dict[str, Any]) -> str:
    """The whole HTML, which holds `data` as JSON: no `<` of it is one of HTML's."""
    block = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    styles = _script("uplot/uPlot.min.css") + _script("panel.css")
    chart = _script("uplot/uPlot.esm.js") + "globalThis.uPlot = uPlot;"
    drawing = _script("panel.js") + (
        'const data = JSON.parse(document.querySelector("#run").textContent);'
        "document.title = data.name;"
        "new Panel(document.body, uPlot).show(data);"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>report</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>\n{styles}</style>\n"
        '<body class="dmd-page">\n'
        f'<script type="application/json" id="run">{block}</script>\n'
        f'<script type="module">\n{chart}\n</script>\n'
        f'<script type="module">\n{drawing}\n</script>\n'
        "</body>\n</html>\n"
    )


def _script(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def described(folder: Path, config: Config, series: Series, columns: int) -> dict[str, Any]:
    """A run as js/panel/panel.js draws it, without pictures. JSON."""
    seconds = series.values.get("seconds", np.empty(0))
    steps, values = thinned(series.steps, series.values, columns)
    return {
        "name": folder.name,
        "preset": config.preset,
        "about": PRESETS[config.preset].about,
        "step": int(series.steps[-1]) if len(series.steps) else 0,
        "steps": config.steps,
        "curves": _curves(steps, values, config),
        "thinned": len(series.steps) if len(steps) < len(series.steps) else 0,
        "settings": settings(config),
        "samplers": _samplers(folder / "summary.json"),
        "time": {
            "seconds": _number(float(seconds.sum())),
            "a_step": _number(float(np.median(seconds[-100:]))) if len(seconds) else None,
        },
    }


def _curves(steps: NDArray[np.int64], values: dict[str, Values], config: Config) -> dict[str, Any]:
    """Columns over `steps`, each with its chart and the name that people know it by."""
    rate = np.array([config.rate(int(step) - 1) for step in steps], np.float64)
    lines = [
        (*CURVES.get(name, (OTHERS, name.replace("/", ": ").replace("_", " "))), value)
        for name, value in values.items()
        if name != "seconds"
    ]
    lines.append((RATE, "of student and critic", rate))
    return {
        "steps": steps.tolist(),
        "lines": [
            {"chart": chart, "label": label, "values": list(map(_number, value.tolist()))}
            for chart, label, value in lines
        ],
    }


def _number(value: float) -> float | None:
    """With as many digits as a chart can show; None, which JSON has a word for, for no number."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def settings(config: Config) -> list[dict[str, str]]:
    """Every setting that has a value, and where it comes from: the preset's source, or the user."""
    told, rows = config.model_dump(mode="json"), []
    choices = PRESETS[config.preset].choices
    for key, value in told.items():
        field, choice = Config.model_fields[key], choices.get(key)
        if choice and value == choice.value:
            source = choice.source
        elif choice:
            source = f"this run's own; the preset has {choice.value}"
        elif not field.is_required() and value == field.default:
            source = "default"
        else:
            source = "this run's own"
        shown = Path(value).name if key in PATHS and value else value
        if shown not in (None, []):
            rows.append({"key": key, "value": _word(shown), "source": source})
    return rows


def _word(value: Any) -> str:
    """As run.yaml has it."""
    return json.dumps(value) if isinstance(value, (bool, list)) else str(value)


def _samplers(summary: Path) -> dict[str, dict[str, float]]:
    """Numbers of teacher and student where they were measured."""
    try:
        told = json.loads(summary.read_text(encoding="utf-8"))
        return {name: told[name] for name in ("teacher", "student")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def picture_files(samples: Path) -> dict[int, Path]:
    """The pictures of a run by step, in order."""
    numbered = {file.stem.removeprefix("step-"): file for file in samples.glob("step-*.png")}
    return {int(n): numbered[n] for n in sorted(numbered) if n.isascii() and n.isdigit()}


def _fewer(pictures: dict[int, Path]) -> list[int]:
    """Steps of those that a report has room for: evenly many, the first and the last among them."""
    steps = list(pictures)
    count = min(len(steps), MOST_PICTURES)
    while True:
        chosen = sorted(
            {steps[i] for i in np.linspace(0, len(steps) - 1, count).round().astype(int)}
        )
        size = sum(pictures[step].stat().st_size for step in chosen)
        if size <= MOST_BYTES or count <= 2:
            return chosen
        count = max(2, count * MOST_BYTES // size)


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + b64encode(picture.read_bytes()).decode()


def _hardware(config: Config) -> str:
    device = config.device_object()
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _versions() -> str:
    return (
        f"dmd-one-step {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )
