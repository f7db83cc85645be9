"""What every test stands on: one thread, a seed, the command line, and a ComfyUI.

The process that hands out tests to the workers reads this, too: nothing large is imported above.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kit.comfy_host import Server
    from kit.command_line import Command, Outcome

# before torch is imported, here and in every process that a test starts: two workers, two cores
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ["OMP_WAIT_POLICY"] = "passive"  # where a test asks for two, they wait without a core
os.environ.pop("COLUMNS", None)  # a worker has one, and rich would keep to it for good


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What is drawn without a generator, fixtures included, is the same whatever ran before."""
    import torch

    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A real ComfyUI with this pack and the probe nodes in it, started when first asked for."""
    from kit import comfy_host

    with comfy_host.Server([comfy_host.PROBE_NODES]) as running:
        yield running


@pytest.fixture
def dmd(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """`python -m dmd_train` with these arguments, in this process, in an empty folder."""
    from kit import command_line

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        code = command_line.run_command(*arguments)
        captured = capfd.readouterr()
        return command_line.Outcome(code, captured.out, captured.err)

    return run
