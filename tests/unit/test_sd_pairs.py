"""Pairs of a Stable Diffusion run: made once, kept, and learnt from."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from kit.command_line import Command, WriteRun, one_line
from kit.runs import metrics
from kit.sd_runs import calls
from torch import Tensor

from dmd_train.data import pairs


def test_the_warm_up_learns_from_pairs_alone_and_the_critic_waits(
    write_sd_run: WriteRun, train: WriteRun
) -> None:
    settings = {"steps": 4, "regression_warmup_steps": 2, "regression_weight": 0.25}
    rows = metrics(train(write_sd_run(**settings)))
    warm = {"step", "student/regression", "student/gradient_norm"}
    whole = warm | {
        "student/distribution_matching",
        "critic/denoising",
        "critic/gradient_norm",
    }
    assert [set(row) for row in rows] == [warm, warm, whole, whole]


def test_pairs_are_made_once(
    write_sd_run: WriteRun,
    dmd: Command,
    train: WriteRun,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run_yaml = write_sd_run(regression_weight=0.25)
    made = calls(monkeypatch, pairs, "sample_teacher")
    outcome = dmd("pairs", run_yaml)
    assert outcome.code == 0 and "run/pairs: 3 pairs" in one_line(outcome.out), outcome
    assert len(made) == 3
    shards = sorted((tmp_path / "run/pairs").iterdir())
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in shards]
    assert dmd("pairs", run_yaml).code == 0
    rows = metrics(train(run_yaml))
    assert all("student/regression" in row for row in rows)
    assert len(made) == 3
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in shards] == before


def test_ctrl_c_while_pairs_are_made_keeps_whole_files_and_the_same_command_goes_on(
    write_sd_run: WriteRun, dmd: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pairs, "BYTES", 1)
    run_yaml = write_sd_run(pairs=10, pair_batch_size=4, regression_weight=0.25)
    assert dmd("pairs", run_yaml).code == 0
    folder = tmp_path / "run/pairs"
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(whole) == 3
    shutil.rmtree(folder)

    sample, made = pairs.sample_teacher, [0]

    def interrupted(*arguments: Any) -> Tensor:
        made[0] += 1
        if made[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(*arguments)

    monkeypatch.setattr(pairs, "sample_teacher", interrupted)
    outcome = dmd("pairs", run_yaml)
    assert outcome.code == 128 + signal.SIGINT
    assert "pairs: 8 of 10 kept; the same command goes on." in one_line(outcome.out)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: content for name, content in whole.items() if name < "shard-00002"
    }
    assert dmd("pairs", run_yaml).code == 0
    assert made[0] == 3
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
