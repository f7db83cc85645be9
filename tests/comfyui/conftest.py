"""Runs that the tests of several files export and sample."""

from __future__ import annotations

import pytest
from kit.comfy_host import Server
from kit.exported import Run, Trained


@pytest.fixture(scope="session")
def trained(server: Server) -> Trained:
    def train(name: str) -> Run:
        run = Run(name, server)
        run.train()
        return run

    return train
