"""One real ComfyUI for all tests below, with this pack and the probe nodes in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kit.comfy_host import PROBE_NODES, Server


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """What the tests compute beside the server is small; two threads would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server([PROBE_NODES]) as running:
        yield running
