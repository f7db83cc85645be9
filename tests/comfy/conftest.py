"""One real ComfyUI for all tests below, with this pack and the probe nodes in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_host import Server

PROBE_NODES = Path(__file__).with_name("probe_nodes")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server([PROBE_NODES]) as running:
        yield running
