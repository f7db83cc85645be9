"""The ground the other browser tests stand on: a stock graph runs from the page."""

from __future__ import annotations

from typing import Any

import pytest
from kit.comfy_host import PromptFailed, PromptRefused
from kit.comfy_page import ComfyPage
from PIL import Image

RED = 0xFF0000


def graph(*nodes: dict[str, Any], links: list[list[Any]]) -> dict[str, Any]:
    """A workflow in the page's JSON. A link: [id, from node, slot, to node, slot, type]."""
    return {"version": 0.4, "nodes": list(nodes), "links": links}


def picture(color: int, width: int = 64) -> dict[str, Any]:
    """A red picture of 64 x 64 pixels, saved."""
    return graph(
        {
            "id": 1,
            "type": "EmptyImage",
            "pos": [100, 100],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
            "widgets_values": [width, 64, 1, color],
        },
        {
            "id": 2,
            "type": "SaveImage",
            "pos": [500, 100],
            "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
            "widgets_values": ["page"],
        },
        links=[[1, 1, 0, 2, 0, "IMAGE"]],
    )


def test_a_stock_graph_queued_from_the_page_writes_its_picture(page: ComfyPage) -> None:
    page.load(picture(RED))
    assert page.missing_nodes() == []
    (file,) = page.server.output_files(page.queue())
    assert Image.open(file).getpixel((0, 0)) == (255, 0, 0)
    assert page.screenshot("stock-graph").stat().st_size > 10_000


def test_a_node_that_no_pack_has_is_named(page: ComfyPage) -> None:
    page.load(graph({"id": 1, "type": "Nobody_Has_This", "pos": [100, 100]}, links=[]))
    assert page.missing_nodes() == ["Nobody_Has_This"]


@pytest.mark.parametrize("page", ["classic"], indirect=True)
def test_a_graph_that_validation_refuses_names_the_node(page: ComfyPage) -> None:
    page.load(picture(RED, width=10**6))
    with pytest.raises(PromptRefused) as refusal:
        page.queue()
    assert refusal.value.node_errors["1"]["class_type"] == "EmptyImage"


@pytest.mark.parametrize("page", ["classic"], indirect=True)
def test_a_node_that_raises_fails_the_run_in_the_page(page: ComfyPage) -> None:
    page.load(
        graph(
            {
                "id": 1,
                "type": "EmptyLatentImage",
                "pos": [100, 100],
                "outputs": [{"name": "LATENT", "type": "LATENT", "links": [1]}],
                "widgets_values": [64, 64, 1],
            },
            {
                "id": 2,
                "type": "Probe_SaveLatent",
                "pos": [500, 100],
                "inputs": [{"name": "latent", "type": "LATENT", "link": 1}],
                "widgets_values": ["../elsewhere"],
            },
            links=[[1, 1, 0, 2, 0, "LATENT"]],
        )
    )
    with pytest.raises(PromptFailed, match="not a plain file name"):
        page.queue()
