"""The example workflows as files: they agree with the nodes, and tell what to put where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kit.comfy_host import PACK, PACK_NAME, Server
from kit.workflows import inputs_of, widgets_of
from PIL import Image

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
NAMES = [file.stem for file in WORKFLOWS]
IN_THE_PAGE_ONLY = "MarkdownNote"
FILE_WIDGETS = ("file", "ckpt_name", "lora_name")
"""Their choices are the user's files."""


@pytest.fixture(scope="module")
def nodes(server: Server) -> dict[str, Any]:
    return server.object_info()


@pytest.mark.parametrize("file", WORKFLOWS, ids=NAMES)
def test_every_widget_value_is_one_that_the_node_takes(file: Path, nodes: dict[str, Any]) -> None:
    for node in json.loads(file.read_text())["nodes"]:
        if node["type"] == IN_THE_PAGE_ONLY:
            continue
        widgets = widgets_of(nodes[node["type"]])
        for (name, type_, about), value in zip(widgets, node["widgets_values"], strict=True):
            where = f"{node['type']}.{name}: {value!r}"
            if name in FILE_WIDGETS:
                assert isinstance(value, str), where
            elif isinstance(type_, list):
                assert value in type_, where
            elif type_ in ("INT", "FLOAT"):
                assert about["min"] <= value <= about["max"], where
            else:
                assert isinstance(value, {"STRING": str, "BOOLEAN": bool}[type_]), where


@pytest.mark.parametrize("file", WORKFLOWS, ids=NAMES)
def test_every_wire_joins_slots_that_exist_and_fit(file: Path, nodes: dict[str, Any]) -> None:
    workflow = json.loads(file.read_text())
    by_id = {node["id"]: node for node in workflow["nodes"]}
    wired = set()
    for link, from_id, output, to_id, slot, type_ in workflow["links"]:
        source, target = by_id[from_id], by_id[to_id]
        name = target["inputs"][slot]["name"]
        assert target["inputs"][slot]["link"] == link
        assert nodes[source["type"]]["output"][output] == type_
        assert inputs_of(nodes[target["type"]])[name][0] == type_, f"{target['type']}.{name}"
        wired.add((to_id, name))
    for node in by_id.values():
        if node["type"] != IN_THE_PAGE_ONLY:
            widgets = {name for name, *_ in widgets_of(nodes[node["type"]])}
            needed = set(nodes[node["type"]]["input"]["required"]) - widgets
            assert {name for id, name in wired if id == node["id"]} >= needed, node["type"]


@pytest.mark.parametrize("file", WORKFLOWS, ids=NAMES)
def test_a_note_names_every_file_that_the_workflow_loads_and_its_folder(file: Path) -> None:
    workflow = json.loads(file.read_text())
    (note,) = (node for node in workflow["nodes"] if node["type"] == IN_THE_PAGE_ONLY)
    (text,) = note["widgets_values"]
    assert "Expect" in text
    for node in workflow["nodes"]:
        if node["type"] == "CheckpointLoaderSimple":
            named = ["models/checkpoints", node["widgets_values"][0]]
        elif node["type"] in ("DMD_LoadLoRA", "LoraLoaderModelOnly"):
            named = ["models/loras", node["widgets_values"][0]]
        elif node["type"] == "DMD_LoadCheckpoint":
            folder, name = node["widgets_values"][0].split("/")
            is_ours = folder == "dmd_students"
            named = [folder] if is_ours else [f"models/{folder}", name]
        else:
            continue
        assert [word for word in named if word not in text] == []


def test_comfyui_offers_the_workflows_as_templates_each_with_a_picture(server: Server) -> None:
    assert sorted(server.get("/workflow_templates")[PACK_NAME]) == NAMES
    for file in WORKFLOWS:
        thumbnail = file.with_suffix(".jpg")
        assert thumbnail.stat().st_size < 60_000
        with Image.open(thumbnail) as picture:
            assert picture.format == "JPEG"
            assert min(picture.size) >= 256
