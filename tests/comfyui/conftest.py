"""One real ComfyUI for all tests below, with this pack and the probe nodes in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kit.comfy_host import PROBE_NODES, Server
from kit.exported import Run, Trained


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with Server([PROBE_NODES]) as running:
        yield running


@pytest.fixture(scope="session")
def trained(server: Server) -> Trained:
    def train(name: str) -> Run:
        run = Run(name, server)
        run.train()
        return run

    return train
