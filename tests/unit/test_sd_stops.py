"""A run on a Stable Diffusion teacher that was stopped, or disturbed, goes on as if it had not."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kit.command_line import Command, WriteRun, one_line
from kit.runs import metrics, same, state
from kit.sd_runs import LEARNS, interrupt
from safetensors.torch import load_file

from dmd_train.config import Config, load_config
from dmd_train.distil import StepReport, distil
from dmd_train.networks.load import load_teacher
from dmd_train.prepare import carried_out, prepare
from dmd_train.run.folder import RunFolder
from dmd_train.terminal import commands as cli

CPU = torch.device("cpu")


def test_a_stopped_lora_run_goes_on_to_bit_identical_weights(
    write_sd_run: WriteRun,
    dmd: Command,
    train: WriteRun,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    settings = {"steps": 5, "checkpoint_every": 2, "regression_weight": 0.25, "batch_size": 2}
    run_yaml = write_sd_run(**settings, **LEARNS)
    run = train(run_yaml)
    whole, student = state(run), load_file(run / "student.safetensors")
    rows = metrics(run)
    shutil.rmtree(run)

    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        outcome = dmd("train", run_yaml)
    assert outcome.code == 128 + signal.SIGINT
    assert f"stopped and saved. Go on with: {cli.PYTHON} -m dmd_train train {run_yaml}" in one_line(
        outcome.out
    )
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    outcome = dmd("train", run_yaml)
    assert outcome.code == 0 and "going on from step 3" in one_line(outcome.out)
    assert same(state(run), whole)
    assert same(load_file(run / "student.safetensors"), student)
    assert metrics(run) == rows


def reports_of(config: Config, run: RunFolder) -> Iterator[StepReport]:
    """The reports that `train` has."""
    loaded = load_teacher(config, CPU)
    return distil(carried_out(prepare(run, loaded), lambda _: None))


def test_checkpoints_deleted_while_a_run_goes_on_are_written_again(
    write_sd_run: WriteRun, train: WriteRun, tmp_path: Path
) -> None:
    run_yaml = write_sd_run(steps=6, checkpoint_every=2, **LEARNS)
    run = train(run_yaml)
    whole, student = state(run), load_file(run / "student.safetensors")
    shutil.rmtree(run)
    seen = []
    config = load_config(run_yaml, [])
    with RunFolder(config) as folder:
        for report in reports_of(config, folder):
            seen.append(sorted(int(f.stem[5:]) for f in folder.checkpoints.glob("*")))
            if report.step == 3:
                shutil.rmtree(folder.checkpoints)
    assert seen == [[], [2], [2], [4], [4], [4, 6]]
    assert same(state(run), whole)
    assert same(load_file(run / "student.safetensors"), student)
