"""Training from ComfyUI's page: what a person sees while it runs, a stop, and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.comfy_host import PACK, PromptFailed, Server
from kit.comfy_page import ARTEFACTS, ComfyPage, opened
from PIL import Image, ImageStat
from playwright.sync_api import Browser

from dmd_train.networks.edm import EDMNetwork
from dmd_train.networks.load import load
from dmd_train.run.folder import newest_checkpoint
from dmd_train.run.metrics import SamplerNumbers, measure_digits

DISTIL_DIGITS = PACK / "workflows/distil-digits.json"
DIGITS = 10
STEPS, PAIRS = 500, 8000
"""A third of the preset's steps, half of its pairs: a minute less, and digits all the same."""
SHOWN = ("DMD_Distill", "DMD_Compare")
PROGRESS = re.compile(r"(pairs|step) (\d+) of (\d+), \d+:\d\d left", re.ASCII)

RED_PICTURE = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0xFF0000},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "after"}},
}


@dataclass
class Trained:
    """One run of distil-digits from the page, with everything but its length as the file has it."""

    page: ComfyPage
    run: Path
    pictures: dict[str, list[Path]]
    """Type of node -> what it shows."""
    told: list[str]
    pictures_told: str
    """What the panel says at the end of the picture that it shows."""
    picture_width: int
    """Of the picture in the panel in the middle of the run."""
    bar: float
    """The node's own, in the middle of the run, from 0 to 1."""


def wait_for_line(page: ComfyPage, kind: str, at_least: int, timeout: float = 400) -> None:
    """Until the line on DMD Distill has come so far."""
    page.page.wait_for_function(
        """([kind, least]) => {
            const found = window.told.at(-1)?.match(/^(pairs|step) (\\d+) of/)
            return found && found[1] === kind && +found[2] >= least
        }""",
        arg=[kind, at_least],
        timeout=timeout * 1000,
    )


def steps_in(metrics: Path) -> list[int]:
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]


def pictures_of(page: ComfyPage, entry: dict[str, Any]) -> dict[str, list[Path]]:
    """Type of node -> the pictures that it shows after a run; a cached node shows its old ones."""
    kinds = {id: node["class_type"] for id, node in page.api_form().items()}
    files = page.server.output_files
    return {kinds[id]: files({"outputs": {id: shown}}) for id, shown in entry["outputs"].items()}


@pytest.fixture(scope="module")
def trained(server: Server, browser: Browser) -> Iterator[Trained]:
    with opened(server, browser, "classic") as page:
        page.load(DISTIL_DIGITS)
        page.set_widgets("DMD_Distill", steps=STEPS, advanced=f"pairs: {PAIRS}")
        page.look_at(*SHOWN)
        page.listen()
        page.press_run()
        wait_for_line(page, "pairs", PAIRS // 4)
        page.screenshot("distil-digits-pairs")
        wait_for_line(page, "step", STEPS // 2)
        node = "window.app.graph.nodes.find(node => node.type === 'DMD_Distill')"
        bar = page.page.evaluate(f"() => {node}.progress ?? 0")
        picture = page.page.locator(".dmd-panel img")
        picture_width = picture.evaluate("img => img.decode().then(() => img.naturalWidth)")
        page.screenshot("distil-digits-learning")
        entry = page.wait_for_end(timeout=600)
        told = page.page.locator(".dmd-panel output", has_text=f"step {STEPS} ")
        told.wait_for()
        page.screenshot("distil-digits-finished")

        yield Trained(
            page=page,
            run=Path(page.line("DMD_Distill").partition("Saved in ")[2]),
            pictures=pictures_of(page, entry),
            told=page.told(),
            pictures_told=told.inner_text(),
            picture_width=picture_width,
            bar=bar,
        )


def test_while_it_runs_the_node_says_how_far_it_is_and_shows_pictures(trained: Trained) -> None:
    progress = [found.groups() for text in trained.told if (found := PROGRESS.match(text))]
    pairs = [(int(done), int(total)) for kind, done, total in progress if kind == "pairs"]
    steps = [(int(done), int(total)) for kind, done, total in progress if kind == "step"]
    for seen, total in ((pairs, PAIRS), (steps, STEPS)):
        assert len(seen) >= 5
        assert seen == sorted(seen)
        assert seen[-1] == (total, total)
    # the first step's, and one in 250
    assert trained.pictures_told == f"step {STEPS} (picture 7 of 7)"
    assert trained.picture_width > 500
    assert 0.4 < trained.bar < 0.7


def test_the_student_from_the_page_is_as_good_as_the_headless_one(trained: Trained) -> None:
    assert trained.run.parent == trained.page.server.base / "output/dmd_runs"
    loaded = load(str(trained.run / "student.safetensors"), torch.device("cpu"))
    assert isinstance(loaded.network, EDMNetwork)
    numbers: SamplerNumbers = measure_digits(
        loaded.network, loaded.recipe, 0, lambda completed: None
    )
    assert numbers.nfe == 1
    assert numbers.frechet_distance < 0.3  # headless, as long: 0.245; make demo: 0.192
    assert numbers.intra_class_std_ratio > 0.8  # 0.863; 0.885


def test_the_page_ends_with_ten_digits_of_one_step_beside_their_teachers(trained: Trained) -> None:
    page = trained.page
    assert page.line("DMD_Distill").startswith(f"digits-one-step, step {STEPS} of {STEPS}: 1 step")
    teacher, student = page.line("DMD_Compare").splitlines()
    assert teacher.startswith("teacher: 35 NFE, ")
    assert re.search(r"student: 1 NFE, .* s an image, \d+\.\dx faster", student)

    (sheet,) = trained.pictures["DMD_Compare"]
    with Image.open(sheet) as picture:
        grey = picture.convert("L")
        picture.save(ARTEFACTS / "distil-digits-sheet.png")
    side = grey.width // DIGITS
    for i in range(DIGITS):  # the student's row is the lower one
        digit = grey.crop(
            (i * side + 4, grey.height - side + 4, (i + 1) * side - 4, grey.height - 4)
        )
        assert ImageStat.Stat(digit).stddev[0] > 40  # strokes, not grey

    fresh = trained.pictures["PreviewImage"]
    assert len(fresh) == DIGITS
    for file in fresh:
        with Image.open(file) as picture:
            assert picture.size == (128, 128)
            assert ImageStat.Stat(picture.convert("L")).stddev[0] > 40
    assert page.pack_errors == []


def test_the_student_is_saved_as_a_file_that_load_dmd_checkpoint_offers(trained: Trained) -> None:
    server = trained.page.server
    file = server.base / "models/checkpoints/dmd/my-digits_00001_.safetensors"
    assert trained.page.line("DMD_SaveStudent").startswith(str(file))
    inputs = server.object_info()["DMD_LoadCheckpoint"]["input"]["required"]
    assert "checkpoints/dmd/my-digits_00001_.safetensors" in str(inputs["file"])


def test_run_again_draws_fresh_digits_and_trains_nothing_twice(trained: Trained) -> None:
    page = trained.page
    page.listen()
    pictures = pictures_of(page, page.queue())
    before, after = (
        [file.read_bytes() for file in run["PreviewImage"]] for run in (trained.pictures, pictures)
    )
    assert len(after) == DIGITS
    assert not set(after) & set(before)
    assert page.told() == []


def test_a_stop_from_the_page_saves_and_says_so_and_run_goes_on(page: ComfyPage) -> None:
    name, steps = f"stopped-{page.renderer}", 150
    at = 37
    page.load(DISTIL_DIGITS)
    page.look_at(*SHOWN)
    quick = "pairs: 3000\npair_batch_size: 64\npair_steps: 9\ncritic_updates: 2"
    page.set_widgets("DMD_Distill", run=name, steps=steps, advanced=quick)
    page.listen()

    def stop() -> str:
        """What the node says then, which a toast says, too."""
        page.press_stop()
        with pytest.raises(PromptFailed, match="execution_interrupted in DMD_Distill"):
            page.wait_for_end()
        said = page.line("DMD_Distill")
        page.page.locator(".p-toast-message", has_text=said).wait_for()
        return said

    page.press_run()
    wait_for_line(page, "pairs", 500)
    assert "finished pairs are kept. Run goes on." in stop()

    page.press_run()
    wait_for_line(page, "step", at)
    said = stop()
    page.screenshot("distil-digits-stopped")
    told = re.fullmatch(rf"stopped at step (\d+) and saved in {name}\. Run goes on\.", said)
    assert told, said
    stopped = int(told[1])
    assert at <= stopped < steps
    run = page.server.base / "output/dmd_runs" / name
    kept = newest_checkpoint(run / "checkpoints")
    assert kept and kept.step == stopped
    assert (run / "student.safetensors").exists()

    assert len(page.server.output_files(page.server.run(RED_PICTURE))) == 1

    page.listen()
    entry = page.queue()
    first = next(text for text in page.told() if text.startswith("step"))
    assert int(first.split()[1]) > stopped
    assert steps_in(run / "metrics.jsonl") == list(range(1, steps + 1))
    assert page.line("DMD_Distill").startswith(f"digits-one-step, step {steps} of {steps}")
    assert len(pictures_of(page, entry)["PreviewImage"]) == DIGITS
    assert page.pack_errors == []
