"""Runs of the real command line on the embedded teacher and on tiny ones, made short."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
import yaml
from kit.command_line import SHORT, Command, WriteRun
from kit.sd_files import Tiny, micro_pipeline, pipelines, single_files
from kit.sd_runs import PROMPTS, SMALL

from dmd_train.files.read import TORCH
from dmd_train.run.sample_sheet import SampleSheet


@pytest.fixture(autouse=True, scope="session")
def no_progress_bars_of_save_pretrained() -> None:
    """A fixture may save its folder within a test that counts the lines on stderr."""
    transformers.logging.disable_progress_bar()
    diffusers.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def pickles_are_read_by_every_torch() -> Iterator[None]:
    """Those before 2.6 run code of theirs, and are asked for none; here nobody else wrote them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("dmd_train.files.read.TORCH", max(TORCH, (2, 6)))
        yield


def written(path: Path, **settings: Any) -> Path:
    """A run.yaml; None leaves a key out."""
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
    return path


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    """Write a short run.yaml into a folder; its output is `folder`/run."""

    def write(folder: Path, **settings: Any) -> Path:
        values = SHORT | {"output": str(folder / "run")} | settings
        return written(folder / "run.yaml", **values)

    return write


@pytest.fixture
def write_sd_run(tmp_path: Path, micro: Tiny) -> WriteRun:
    """Write a run.yaml of Stable Diffusion, whose output is run/ beside it."""

    def write(**settings: Any) -> Path:
        listed = tmp_path / "prompts.txt"
        listed.write_text("\n".join(PROMPTS))
        own = {
            "teacher": str(micro("sd1")),
            "prompts": str(listed),
            "output": str(tmp_path / "run"),
        }
        return written(tmp_path / "run.yaml", **SMALL | own | settings)

    return write


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No curves, and sheets of two columns: seconds of a run. The runs of the presets have all."""
    monkeypatch.setattr("dmd_train.run.curves.save_curves", lambda *_: None)
    monkeypatch.setattr(SampleSheet.__init__, "__defaults__", (2,))


@pytest.fixture
def train(dmd: Command, few_pictures: None, tmp_path: Path) -> WriteRun:
    """Train to the end; gives the run folder."""

    def train(run_yaml: Path, *arguments: str) -> Path:
        outcome = dmd("train", run_yaml, *arguments)
        assert outcome.code == 0, outcome.out + outcome.err
        return tmp_path / "run"

    return train


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny Stable Diffusion file by name; not to be changed."""
    return single_files(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def pipeline(tiny: Tiny) -> Tiny:
    """The same as a diffusers folder."""
    return pipelines(tiny)


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A diffusers folder of a few thousand weights, by family; not to be changed."""
    parent = tmp_path_factory.mktemp("micro")

    def made(family: str) -> Path:
        folder = parent / family
        return folder if folder.exists() else micro_pipeline(folder, family)

    return made
