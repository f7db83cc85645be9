"""What the page shows of our nodes in words: their texts to translate, their help pages."""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

import pytest
from kit.comfy_host import PACK, PACK_NAME, Server
from kit.node_texts import FILE, PREFIX, node_texts

from dmd_train.config import Config

OF_THE_GRAPH = {"teacher", "prompts", "images", "output", "preset", "device", "seed"}
"""Settings that wires and widgets of DMD Distill make."""


@pytest.fixture(scope="module")
def nodes(server: Server) -> dict[str, Any]:
    return {id: node for id, node in server.object_info().items() if id.startswith(PREFIX)}


def test_the_texts_to_translate_are_the_nodes_own(nodes: dict[str, Any]) -> None:
    assert json.loads(FILE.read_text()) == node_texts(nodes), (
        "write locales/en/nodeDefs.json anew: PYTHONPATH=tests python tests/kit/node_texts.py"
    )


def test_comfyui_serves_the_texts(server: Server, nodes: dict[str, Any]) -> None:
    served = server.get("/i18n")["en"]["nodeDefs"]
    assert {id: served[id]["display_name"] for id in nodes} == {
        id: node["display_name"] for id, node in nodes.items()
    }


def test_no_node_lacks_a_help_page_and_no_help_page_a_node(nodes: dict[str, Any]) -> None:
    assert {file.stem for file in (PACK / "js/docs").glob("*.md")} == set(nodes)


def test_each_help_page_is_served_and_names_every_input_and_output(
    server: Server, nodes: dict[str, Any]
) -> None:
    for node_id, node in nodes.items():
        address = f"{server.address}/extensions/{PACK_NAME}/docs/{node_id}.md"
        with urllib.request.urlopen(address) as answer:
            page = answer.read().decode()
        assert page.startswith(f"# {node['display_name']}\n")
        slots = [*node["input"]["required"], *node["input"].get("optional", {})]
        slots += node["output_name"]
        assert [name for name in slots if f"`{name}`" not in page] == [], node_id
        assert all(part in page for part in ("## Example", "## When it does not work"))


def test_the_help_page_of_dmd_distill_explains_every_setting_and_no_other() -> None:
    page = (PACK / "js/docs/DMD_Distill.md").read_text()
    table = page.partition("## Settings for `advanced`")[2].partition("## Example")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(Config.model_fields.keys() - OF_THE_GRAPH)
