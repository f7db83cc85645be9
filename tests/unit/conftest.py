"""Runs of the real command line on the embedded teacher, made short."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffusers
import pytest
import transformers
import yaml
from kit.sd_files import Tiny, pipelines, single_files

from dmd_train.terminal import commands as cli

SHORT = {
    "teacher": "digits",
    "preset": "digits-one-step",
    "steps": 40,
    "batch_size": 4,
    "pairs": 20,
    "pair_batch_size": 4,
    "pair_steps": 2,
    "critic_updates": 2,
    "checkpoint_every": 10,
    "sample_every": 20,
}


@pytest.fixture(autouse=True, scope="session")
def no_progress_bars_of_save_pretrained() -> None:
    """A fixture may save its folder within a test that counts the lines on stderr."""
    transformers.logging.disable_progress_bar()
    diffusers.logging.disable_progress_bar()


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def dmd(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    """`python -m dmd_train` with these arguments, in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        code = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


WriteRun = Callable[..., Path]


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    """Write a short run.yaml into a folder; its output is `folder`/run. None leaves a key out."""

    def write(folder: Path, **settings: object) -> Path:
        values = SHORT | {"output": str(folder / "run")} | settings
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return path

    return write


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny Stable Diffusion file by name; not to be changed."""
    return single_files(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def pipeline(tiny: Tiny) -> Tiny:
    """The same as a diffusers folder."""
    return pipelines(tiny)
