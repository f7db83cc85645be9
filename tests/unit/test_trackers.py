"""TensorBoard beside a run."""

import shutil
from pathlib import Path

from kit.command_line import WriteRun
from kit.runs import metrics


def everything_in(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def test_tensorboard_writes_into_the_run_folder_and_changes_no_number(
    write_sd_run: WriteRun, train: WriteRun, tmp_path: Path
) -> None:
    settings = {"sample_every": 2, "steps": 2}
    run = train(write_sd_run(**settings))
    plain = metrics(run)
    assert not list(run.rglob("events.*"))
    shutil.rmtree(run)
    train(write_sd_run(**settings, trackers=["tensorboard"]))
    assert metrics(run) == plain
    events = [file for file in run.rglob("events.*") if b"samples" in file.read_bytes()]
    assert events and all(b"critic/denoising" in file.read_bytes() for file in events)
    assert everything_in(tmp_path) == everything_in(run) | {
        str(tmp_path / name) for name in ("prompts.txt", "run.yaml", "run")
    }
