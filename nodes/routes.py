"""What ComfyUI's page asks of a run that it shows: read-only, by the run's name alone."""

import asyncio
import re
from pathlib import Path
from threading import Lock
from typing import Any

from aiohttp import web
from server import PromptServer

from ..dmd_train.config import load_config
from ..dmd_train.errors import UserError
from ..dmd_train.run.report import described, picture_files
from ..dmd_train.run.series import Series
from .planned import planned
from .run_folders import run_folders

COLUMNS = 400
"""Pixels of a curve: a node is seldom wider, and training shares the time of every answer."""

PICTURE = re.compile(r"step-\d{8,12}\.png", re.ASCII)

MOST_WATCHED = 8
"""Runs whose series are in memory."""

_watched: dict[Path, Series] = {}
_lock = Lock()


def register_routes() -> None:
    """GET /dmd-one-step/runs/NAME, its pictures by their names, and /dmd-one-step/planned."""
    routes = PromptServer.instance.routes
    routes.get("/dmd-one-step/runs/{name}")(run_state)
    routes.get("/dmd-one-step/runs/{name}/{picture}")(run_picture)
    routes.get("/dmd-one-step/planned")(next_run)


async def run_state(request: web.Request) -> web.Response:
    """A run as js/panel/panel.js draws it; nothing, 204, where it is as in the `seen` answer."""
    folder = _folder(request)
    try:
        seen = request.query.get("seen")
        state = await asyncio.to_thread(_state, folder, seen)
    except UserError as error:
        return web.json_response({"error": str(error)}, status=422)
    return web.json_response(state) if state else web.Response(status=204)


async def run_picture(request: web.Request) -> web.StreamResponse:
    """A picture of samples/. It is asked for again each time, as a run may be begun anew."""
    name = request.match_info["picture"]
    file = _folder(request) / "samples" / name
    if not PICTURE.fullmatch(name) or not file.is_file():
        raise web.HTTPNotFound
    return web.FileResponse(file, headers={"Cache-Control": "no-cache"})


async def next_run(request: web.Request) -> web.Response:
    """The settings that Run would begin with, by the widgets in the query; 422: what it refuses."""
    try:
        rows = await asyncio.to_thread(planned, dict(request.query))
    except UserError as error:
        return web.json_response({"error": str(error)}, status=422)
    return web.json_response({"settings": rows})


def _folder(request: web.Request) -> Path:
    """That of the name. It is looked up among those that are there: a path finds nothing."""
    folder = run_folders().get(request.match_info["name"])
    if folder is None:
        raise web.HTTPNotFound
    return folder


def _state(folder: Path, seen: str | None) -> dict[str, Any] | None:
    now = _version(folder)
    if now == seen:
        return None
    with _lock:
        series = _watched.pop(folder, None) or Series(folder / "metrics.jsonl")
        _watched[folder] = series
        for oldest in list(_watched)[:-MOST_WATCHED]:
            del _watched[oldest]
        series.read()
        config = load_config(folder / "run.yaml", [])
        state = described(folder, config, series, COLUMNS)
    pictures = [{"step": step} for step in picture_files(folder / "samples")]
    return state | {
        "pictures": pictures,
        "pictures_drawn": len(pictures),
        "facts": {},
        "version": now,
    }


def _version(folder: Path) -> str:
    """Another one whenever something to show was written."""
    files = [folder / name for name in ("run.yaml", "metrics.jsonl", "samples", "summary.json")]
    stats = [file.stat() for file in files if file.exists()]
    return " ".join(f"{stat.st_mtime_ns}-{stat.st_size}" for stat in stats)
