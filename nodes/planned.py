"""What DMD Distill would begin a run with: the number behind every 0, or what Run would refuse."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import folder_paths

from ..dmd_train.config import CANVAS, make_config
from ..dmd_train.errors import UserError
from ..dmd_train.families import FAMILIES
from ..dmd_train.files.read import peek
from ..dmd_train.networks.recognise import recognise
from ..dmd_train.run.report import settings
from .distil import AUTO, FROM_THE_GRAPH, chosen
from .model_files import path_of

FOLDERS = {"ckpt_name": "checkpoints", "unet_name": "diffusion_models"}
"""Widgets of ComfyUI's loaders -> the folder whose files they name."""


Number = TypeVar("Number", int, float)


def planned(widgets: Mapping[str, str]) -> list[dict[str, str]]:
    """Settings, each with its source, by the widgets of the node and of the loader before it.

    Raises UserError for what Run would refuse, and where the preset hangs on a model that is not
    known here.
    """
    family, preset = _family(widgets), widgets.get("preset", AUTO)
    if preset == AUTO and family is None:
        raise UserError(f"preset: {AUTO}: wire a loader into model to see the numbers.")
    values = chosen(
        preset,
        family or "",
        _number("steps", widgets, int),
        _number("resolution", widgets, int),
        _number("guidance", widgets, float),
        _number("rank", widgets, int),
        _number("seed", widgets, int),
        widgets.get("advanced", ""),
    )
    placeholder = {"teacher": CANVAS, "output": "run"}
    config = make_config(values | placeholder, "DMD Distill")
    rows = [row for row in settings(config) if row["key"] not in FROM_THE_GRAPH]
    for row in rows:
        if row["key"] == "resolution" and not config.resolution:
            row |= {"value": _native_size(family), "source": "the model's own"}
    return [{"key": "preset", "value": config.preset, "source": "this node"}, *rows]


def _number(name: str, widgets: Mapping[str, str], kind: type[Number]) -> Number:
    try:
        return kind(widgets.get(name) or 0)
    except ValueError:
        raise UserError(f"{name}: '{widgets[name]}' is no number.") from None


def _family(widgets: Mapping[str, str]) -> str | None:
    """Of the file in the loader; "" for one that we do not know, None where there is none."""
    if "file" in widgets:
        path: str | Path | None = path_of(widgets["file"])
    else:
        found = [(FOLDERS[key], widgets[key]) for key in FOLDERS if key in widgets]
        path = folder_paths.get_full_path(*found[0]) if found else None
    if path is None:
        return None
    try:
        return recognise(*peek(Path(path)), str(path)).family
    except UserError:
        return ""


def _native_size(family: str | None) -> str:
    known = FAMILIES.get(family or "")
    if not known or not known.size:
        return "0"
    return f"{known.size} or {known.size_of_v}" if known.size_of_v else str(known.size)
