"""An input of a running ComfyUI, and how it ended: what its node or ComfyUI said, what is left."""

from __future__ import annotations

import json
import os
import resource
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import psutil
import torch
from kit.comfy_host import PACK, PROBE_NODES, PromptRefused, Server
from kit.graphs import DIGITS_TEACHER, Graph
from kit.hostile.canvas import FEW, QUICK, Canvas, spoiled
from kit.hostile.pickles import Bomb
from kit.hostile.values import CONTROL
from kit.outcome import MEMORY, PATIENCE, PROOF, SECONDS, Outcome, unreadable
from kit.stand_ins import made_small, put_files
from kit.workflows import with_widgets
from safetensors.torch import save_file

from dmd_train.files.read import read_safetensors
from dmd_train.method.recipe import Recipe
from dmd_train.networks.load import DIGITS_TEACHER as DIGITS_FILE

if TYPE_CHECKING:
    from kit.comfy_page import ComfyPage

NODES, WORKFLOWS = "nodes", "workflows"
CANVAS = (NODES, WORKFLOWS)
"""Kinds of input."""

LONG_ENOUGH = 4
"""Seconds of one processor after which what goes on and on is stopped, as a person would."""
REFUSED, STOPPED = 2, 3
"""Codes of an outcome, beside 0 for what was asked and 2 for a line on a node."""
OURS = "DMD_"

PYTHONS_OWN = (
    "AttributeError",
    "TypeError",
    "ValueError",
    "KeyError",
    "IndexError",
    "RuntimeError",
)
GROWS = ("output/dmd_runs/", "output/dmd_pairs/", "user/", "temp/", "comfyui.log")
"""Below the server's folder: what a prompt may change."""
NEW = ("output/", "models/loras/", "models/diffusion_models/", "models/checkpoints/")
"""And where files may come to lie beside those that are there."""
ODD_NAME = "100%s \x1b[31mred.safetensors"
THESES = ("there", "input", "output", "models", ".")


@contextmanager
def on_the_canvas(seed: int, kinds: set[str]) -> Iterator[dict[str, Callable[[int], Outcome]]]:
    """By kind, in a ComfyUI of its own."""
    with ExitStack() as until_the_end:
        server = until_the_end.enter_context(Server([PROBE_NODES]))
        page = None
        if WORKFLOWS in kinds:
            from kit.comfy_page import launch, opened
            from playwright.sync_api import sync_playwright

            put_files(server.base / "models")
            browser = launch(until_the_end.enter_context(sync_playwright()))
            page = until_the_end.enter_context(opened(server, browser, "classic"))
        until_the_end.enter_context(guarded(server))
        yield tries(server, page, seed)


def tries(server: Server, page: ComfyPage | None, seed: int) -> dict[str, Callable[[int], Outcome]]:
    """By kind, in a server that is `guarded`."""
    canvas = Canvas(server.object_info())
    found: dict[str, Callable[[int], Outcome]] = {
        NODES: lambda number: tried(
            NODES, number, canvas.prompt(Random(f"{seed} {NODES} {number}")), canvas, server
        )
    }
    if page:
        found[WORKFLOWS] = partial(_workflow, page, canvas, seed)
    return found


def _workflow(page: ComfyPage, canvas: Canvas, seed: int, number: int) -> Outcome:
    """One of ours, made small, spoiled, opened in the page and run as the page would send it."""
    from playwright.sync_api import Error

    random = Random(f"{seed} {WORKFLOWS} {number}")
    file = random.choice(sorted((PACK / "workflows").glob("*.json")))
    workflow = json.loads(file.read_text())
    if file.stem.endswith("digits"):
        workflow = with_widgets(workflow, QUICK, canvas.nodes)
    workflow = spoiled(workflow, random)
    try:
        page.load(workflow)
        prompt = page.api_form()
    except Error as error:
        outcome = Outcome(WORKFLOWS, number, None, REFUSED, 0.0, error.message[:500], [file.stem])
    else:
        outcome = tried(WORKFLOWS, number, _small(prompt), canvas, page.server)
    wrong = outcome.wrong or next(iter(page.pack_errors), None)
    page.clear()
    return outcome._replace(wrong=wrong, arguments=[file.stem, *outcome.arguments])


def _small(prompt: dict[str, Any]) -> dict[str, Any]:
    """For the stand-ins, where it is still a prompt that loads one of them."""
    try:
        return made_small(prompt)
    except (ValueError, KeyError, TypeError):
        return prompt


@contextmanager
def guarded(server: Server) -> Iterator[None]:
    """Files that nobody may touch beside the server's own, and a bound on its memory.

    There are files to load, some of them damaged, and a run to go on with.
    """
    models, there = server.base / "models", [server.base / folder for folder in THESES]
    for folder in there:
        folder.mkdir(exist_ok=True)
        (folder / "thesis.txt").write_text("years of work")
    weights, about = read_safetensors(DIGITS_FILE)
    recipe = Recipe(family="digits", prediction="edm", timesteps=(999,), noise_scale=80.0)
    about |= recipe.to_metadata("digits", (1, 8, 8)) | {"modelspec.license": CONTROL}
    for folder in ("checkpoints", "loras"):
        (models / folder).mkdir(exist_ok=True)
    own = [models / "checkpoints" / name for name in ("bomb.bin", "cut.safetensors", ODD_NAME)]
    own.append(models / "loras/of-digits.safetensors")
    torch.save({"a": Bomb()}, own[0])
    own[1].write_bytes(DIGITS_FILE.read_bytes()[:5000])
    save_file(weights, own[2], about)
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, own[3], about)
    begun = Graph()
    teacher = begun.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)
    widgets = {"preset": "digits-one-step", "resolution": 0, "guidance": 0.0, "rank": 0, "seed": 0}
    widgets |= {"steps": 1, "run": "begun", "advanced": FEW}
    begun.add("DMD_Distill", model=teacher, conditions=begun.classes(), **widgets)
    server.run(begun)
    process = server.process_id
    size = psutil.Process(process).memory_info().vms
    before = resource.prlimit(process, resource.RLIMIT_AS)
    resource.prlimit(process, resource.RLIMIT_AS, (size + 3 * MEMORY, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_AS, before)
        for path in [*own, *(folder / "thesis.txt" for folder in there)]:
            path.unlink(missing_ok=True)


def tried(kind: str, number: int, prompt: Any, canvas: Canvas, server: Server) -> Outcome:
    """The prompt (API form) on this server, which must answer afterwards."""
    if deaf := _deaf(server):
        return Outcome(kind, number, f"not tried: {deaf}", REFUSED, 0.0, "", [])
    process = psutil.Process(server.process_id)
    since, before = process.cpu_times().user, _files(server)
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak of memory counts from here
    at_first = process.memory_info().rss
    try:
        code, wrong, said = _ended(server, server.submit(prompt), process, since)
        if wrong in PYTHONS_OWN and canvas.is_miswired(prompt):
            wrong = None
    except PromptRefused as refusal:
        code, wrong, said = REFUSED, None, str(refusal)
    except urllib.error.HTTPError as answer:
        code, wrong, said = REFUSED, None, f"HTTP {answer.code} {answer.read().decode()}"
    seconds = process.cpu_times().user - since
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
    if wrong is None and peak - at_first > MEMORY:
        wrong = f"{(peak - at_first) / 2**30:.1f} GB"
    wrong = wrong or _harm(before, _files(server)) or _deaf(server)
    return Outcome(kind, number, wrong, code, seconds, said, [json.dumps(prompt)[:5000]])


def _ended(
    server: Server, prompt_id: str, process: psutil.Process, since: float
) -> tuple[int, str | None, str]:
    """Code, what is wrong, and what was said, of what runs; stopped where it goes on and on."""
    begun, stops = time.monotonic(), 0
    while not (entry := server.get(f"/history/{prompt_id}").get(prompt_id)):
        seconds, clock = process.cpu_times().user - since, time.monotonic() - begun
        if seconds > SECONDS or clock > PATIENCE:
            return 1, "hangs", ""
        if seconds > LONG_ENOUGH * (1 + stops) or clock > PATIENCE / 4 * (1 + stops):
            server.interrupt()
            stops += 1
        time.sleep(0.02)
    for event, detail in entry["status"]["messages"]:
        if event == "execution_interrupted":
            return STOPPED, None, "stopped"
        if event == "execution_error":
            return REFUSED, _wrong_line(detail), _line_of(detail)
    texts = [
        str(text) for shown in _ours(entry).values() for text in shown.get("text", ()) if shown
    ]
    return 0, next(filter(None, map(unreadable, texts)), None), " | ".join(texts)


def _ours(entry: dict[str, Any]) -> dict[str, Any]:
    """What nodes of ours show."""
    nodes = entry["prompt"][2]
    outputs: dict[str, Any] = entry["outputs"]
    return {id: shown for id, shown in outputs.items() if nodes[id]["class_type"].startswith(OURS)}


def _line_of(detail: dict[str, Any]) -> str:
    return f"{detail['node_type']}: {detail['exception_type']}: {detail['exception_message']}"


def _wrong_line(detail: dict[str, Any]) -> str | None:
    """What is wrong with an error of one of our nodes."""
    if not detail["node_type"].startswith(OURS):
        return None
    if found := unreadable(detail["exception_message"].strip()):
        return found
    told = detail["exception_type"].rpartition(".")[2]
    return None if told in ("UserError", "OutOfMemory", "ExecutionBlocked") else told


def _files(server: Server) -> dict[str, Any]:
    """Every file of the server's folder and of the pack's own, by name, and when it changed."""
    places = (server.base, PACK / "students", PACK / "runs", PACK / "workflows", PACK / "nodes")
    found = {}
    for place in places:
        for folder, _, names in os.walk(place):
            for name in names:
                path = Path(folder, name)
                about = path.lstat()
                known = path.relative_to(place) if place == server.base else path
                if path.suffix != ".pyc":
                    found[str(known)] = (about.st_ino, about.st_size, about.st_mtime_ns)
    if Path(f"/proc/{server.process_id}/cwd", PROOF).exists():
        found[PROOF] = "here"
    return found


def _harm(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """What was done to files that nobody named, None where nothing."""
    for name in before.keys() | after.keys():
        if before.get(name) == after.get(name) or name.startswith(GROWS):
            continue
        if Path(name).name == PROOF:
            return "executed"
        if name in before:
            return f"changed {name}"
        if not name.startswith(NEW):
            return f"left {name}"
    return None


def _deaf(server: Server) -> str | None:
    """Whether ComfyUI has stopped answering, or still runs what was stopped."""
    queue = server.get("/queue")
    return "still runs" if queue["queue_running"] or queue["queue_pending"] else None
