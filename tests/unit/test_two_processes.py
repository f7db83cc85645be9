"""A run over two processes is the run of one."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit.command_line import WriteRun, one_line
from kit.runs import apart, metrics, state
from kit.sd_files import COLOURED_DIGITS
from kit.sd_runs import LEARNS
from kit.two_processes import in_two_processes

ROOT = Path(__file__).parents[2]


def start_two(run_yaml: Path) -> "subprocess.Popen[str]":
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*launch, "-m", "dmd_train", "train", str(run_yaml)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.long
@pytest.mark.parametrize("teacher", ["digits", "coloured-digits"])
def test_two_processes_give_the_weights_of_one(
    teacher: str, write_sd_run: WriteRun, write_run: WriteRun, train: WriteRun, tmp_path: Path
) -> None:
    if teacher == "digits":
        run_yaml = write_run(tmp_path, steps=4, sample_every=4, checkpoint_every=2)
    else:
        settings = {"teacher": str(COLOURED_DIGITS), "batch_size": 2, "pair_batch_size": 2}
        run_yaml = write_sd_run(**settings, regression_weight=0.25, sample_every=3, **LEARNS)
    code, output = in_two_processes(tmp_path / "said", "train", run_yaml)
    assert code == 0, output
    assert one_line(output).count("finished. Next:") == 1  # said by one of them
    run = tmp_path / "run"
    two, rows = state(run), metrics(run)
    shards = {file: file.read_bytes() for file in run.glob("pairs/*")}
    assert list(run.glob("samples/*.png")) and shards
    shutil.rmtree(run)
    one = state(train(run_yaml))
    for part in ("student/", "critic/", "ema/"):
        assert apart(two, one, part) < 1e-5
    for got, expected in zip(rows, metrics(run), strict=True):
        assert got == pytest.approx(expected, rel=1e-3)
    assert {file: file.read_bytes() for file in run.glob("pairs/*")} == shards


@pytest.mark.long
def test_a_run_begun_by_two_processes_and_stopped_goes_on_in_one(
    write_sd_run: WriteRun, train: WriteRun, tmp_path: Path
) -> None:
    run_yaml = write_sd_run(steps=10, batch_size=2, checkpoint_every=1, **LEARNS)
    run = tmp_path / "run"
    process = start_two(run_yaml)
    while not list(run.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.terminate()
    output = one_line(process.communicate(timeout=120)[0])
    assert process.returncode != 0 and "stopped and saved. Go on with: " in output
    stopped = metrics(run)[-1]["step"]
    assert stopped < 10
    assert (run / f"checkpoints/step-{stopped:08d}.safetensors").exists()
    assert (run / "student.safetensors").exists()
    mixed = state(train(run_yaml))
    shutil.rmtree(run)
    one = state(train(run_yaml))
    for part in ("student/", "critic/", "ema/"):
        assert apart(mixed, one, part) < 1e-5
