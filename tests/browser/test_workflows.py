"""The example workflows in the page: they open, and they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kit.comfy_host import PACK, Server
from kit.comfy_page import ComfyPage
from kit.stand_ins import made_small, put_files
from PIL import Image, ImageStat

from dmd_train.files.read import peek
from dmd_train.networks.recognise import recognise

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
QUICKSTART = PACK / "workflows/quickstart-digits.json"
STOCK = "stock-ksampler"
DIGITS = 10
RECIPES = {
    "compare-teacher-student": "SDXL, LDM UNet: 1 step at t = 399",
    "sd15-one-step": "SD 1.x, LDM UNet: 1 step at t = 999",
    "sdxl-four-step-lora": "SDXL, kohya LoRA: 4 steps at t = 999, 749, 499, 249",
    "sdxl-one-step": "SDXL, LDM UNet: 1 step at t = 399",
}
"""Workflow -> what its load node must say."""
PICTURES = {
    "compare-teacher-student": [(64 + 16 + 64, 64)],
    "sd15-one-step": [(64, 64)] * 4,
    "sdxl-four-step-lora": [(64, 64)],
    "sdxl-one-step": [(64, 64)],
}
"""Workflow -> sizes of the pictures it writes, when it draws 64 x 64 pixels."""
LEARNED = {
    "distil-flow-model": "any-one-step-lora, step 2 of 2: 1 step at t = 999, cfg 1.",
    "distil-sd15-lora": "sd15-one-step-lora, step 2 of 2: 1 step at t = 499, cfg 1.",
    "distil-sdxl-lora": "sdxl-one-step-lora, step 2 of 2: 1 step at t = 499, cfg 1.",
    "distil-your-look": "sd15-one-step-lora, step 2 of 2: 1 step at t = 499, cfg 1.",
}
"""Workflow -> what its DMD Distill must say at the end; distil-digits is in test_training.py."""


def members(workflow: dict[str, Any]) -> dict[str, list[int]]:
    """Title of a group -> the nodes that stand in it, in a workflow's file."""
    inside = {}
    for group in workflow["groups"]:
        left, top, width, height = group["bounding"]
        inside[group["title"]] = [
            node["id"]
            for node in workflow["nodes"]
            if left <= node["pos"][0] < left + width and top <= node["pos"][1] < top + height
        ]
    return inside


@pytest.fixture(scope="module")
def files(server: Server) -> None:
    put_files(server.base / "models")


def test_every_workflow_opens_without_a_missing_node_and_keeps_its_groups(
    page: ComfyPage,
) -> None:
    for workflow in WORKFLOWS:
        page.load(workflow)
        assert page.missing_nodes() == [], workflow.name
        # Frontend 1.32.9 scatters the nodes of a file that does not say where it is looked at.
        assert page.members() == members(json.loads(workflow.read_text()))
        page.screenshot(f"workflow-{workflow.stem}")
    assert page.page.get_by_text("Invalid workflow").count() == 0
    assert page.pack_errors == []


def test_the_quickstart_run_from_the_page_shows_ten_digits_of_student_and_teacher(
    page: ComfyPage,
) -> None:
    page.server.post("/free", {"unload_models": True, "free_memory": True})  # nothing cached
    page.load(QUICKSTART)
    student, teacher = page.lines()
    assert "Run once" in student.inner_text()
    entry = page.queue()

    files = page.server.output_files(entry)
    assert len(files) == 2 * DIGITS
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (128, 128)
            assert ImageStat.Stat(picture.convert("L")).stddev[0] > 40  # strokes, not grey
    assert [len(shown) for shown in page.images()] == [DIGITS, DIGITS]

    assert student.is_visible()
    assert student.inner_text().startswith("digits, our student: 1 step at t = 999; licence")
    assert teacher.inner_text().startswith("digits, our teacher: many steps; licence")
    assert page.pack_errors == []
    page.screenshot("quickstart")


def test_the_line_is_neither_saved_nor_sent(page: ComfyPage) -> None:
    page.load(QUICKSTART)
    sent = [node["inputs"] for node in page.api_form().values()]
    assert {"file": "dmd_students/digits-one-step.safetensors"} in sent
    saved = page.page.evaluate("() => window.app.graph.serialize().nodes")
    loaders = [node for node in saved if node["type"] == "DMD_LoadCheckpoint"]
    assert [len(node["widgets_values"]) for node in loaders] == [1, 1]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("page", ["classic"], indirect=True)
def test_every_workflow_of_a_published_file_runs_with_a_small_one_in_its_place(
    page: ComfyPage,
) -> None:
    for name in RECIPES:
        page.load(PACK / f"workflows/{name}.json")
        entry = page.server.run(made_small(page.api_form()))
        (text,) = (shown["text"][0] for shown in entry["outputs"].values() if "text" in shown)
        assert text.startswith(RECIPES[name])
        pictures = [Image.open(file) for file in page.server.output_files(entry)]
        assert [picture.size for picture in pictures] == PICTURES[name]


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("page", ["classic"], indirect=True)
def test_every_workflow_that_distils_compares_and_saves_with_small_files_and_few_steps(
    page: ComfyPage,
) -> None:
    for name in LEARNED:
        page.load(PACK / f"workflows/{name}.json")
        prompt = made_small(page.api_form())
        entry = page.server.run(prompt, timeout=300)
        shown = {prompt[id]["class_type"]: shown for id, shown in entry["outputs"].items()}
        assert shown["DMD_Distill"]["text"][0].startswith(LEARNED[name])
        assert shown["DMD_Compare"]["text"][1].startswith("student: 1 NFE")
        (saved,) = shown["DMD_SaveStudent"]["text"]
        file = Path(saved.partition(": press R, then use Load DMD LoRA")[0])
        assert file.parent == page.server.base / "models/loras/dmd"
        found = recognise(*peek(file), str(file))
        assert found.recipe and found.recipe.nfe == 1


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("page", ["classic"], indirect=True)
def test_the_workflow_without_our_nodes_has_none_and_runs_with_the_settings_of_499(
    page: ComfyPage,
) -> None:
    page.load(PACK / f"workflows/{STOCK}.json")
    prompt = page.api_form()
    assert not any(node["class_type"].startswith("DMD_") for node in prompt.values())
    (sampler,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler")
    told = ("steps", "cfg", "sampler_name", "scheduler", "denoise")
    assert [sampler[key] for key in told] == [1, 1, "lcm", "simple", 0.5]
    entry = page.server.run(made_small(prompt))
    pictures = [Image.open(file) for file in page.server.output_files(entry)]
    assert [picture.size for picture in pictures] == [(64, 64)] * 4


def test_no_workflow_is_left_out() -> None:
    in_other_tests = {QUICKSTART.stem, "distil-digits", STOCK}
    assert {workflow.stem for workflow in WORKFLOWS} == {*RECIPES, *LEARNED, *in_other_tests}
