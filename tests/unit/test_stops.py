"""Ctrl-C while libraries load, and a terminal that is closed."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit.command_line import WriteRun

from dmd_train.files.read import read_safetensors

ROOT = Path(__file__).parents[2]

PATIENCE = 600
"""Seconds after which a process hangs: on a busy machine a minute is soon over."""


def start(*arguments: object, **how: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dmd_train", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload]


CTRL_C_AT = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv[1:] = sys.argv[1:] + ["presets"]
runpy.run_module("dmd_train", run_name="__main__")
"""
"""`python -m dmd_train`, with a Ctrl-C when a module is about to be imported."""


@pytest.mark.parametrize(
    "module", ["dmd_train.terminal.commands", "numpy", "torch", "torch._C", "rich.table", "psutil"]
)
def test_ctrl_c_while_libraries_load_is_no_traceback(module: str) -> None:
    command = [sys.executable, "-c", CTRL_C_AT, module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def wait_for_checkpoint(run: Path, process: "subprocess.Popen[str]") -> None:
    while not list(run.glob("checkpoints/step-*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)


def newest(run: Path) -> Path:
    return max(run.glob("checkpoints/step-*.safetensors"))


def test_a_closed_terminal_is_a_stop_that_saves(tmp_path: Path, write_run: WriteRun) -> None:
    run_yaml = write_run(tmp_path, steps=4000)
    ours, theirs = pty.openpty()
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    own = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); import runpy, sys; "
    program = f"{own}sys.argv[0] = 'dmd_train'; runpy.run_module('dmd_train', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "train", str(run_yaml)],
        cwd=ROOT,
        start_new_session=True,
        text=True,
        **terminal,
    )
    os.close(theirs)
    wait_for_checkpoint(tmp_path / "run", process)
    os.close(ours)
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGHUP
    at = int(newest(tmp_path / "run").stem.removeprefix("step-"))
    metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert len(metrics) == at < 4000
    assert (tmp_path / "run/student.safetensors").exists()
    assert read_safetensors(newest(tmp_path / "run"))


def test_sighup_sent_twice_saves_and_says_how_to_go_on(tmp_path: Path, write_run: WriteRun) -> None:
    process = start("train", write_run(tmp_path, steps=4000))
    wait_for_checkpoint(tmp_path / "run", process)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGHUP, err
    assert "stopped and saved. Go on with: " in " ".join(out.split())


def test_a_folder_that_is_deleted_under_a_run_is_called_that(
    tmp_path: Path, write_run: WriteRun
) -> None:
    process = start("train", write_run(tmp_path, steps=100_000))
    wait_for_checkpoint(tmp_path / "run", process)
    (tmp_path / "run").rename(tmp_path / "moved")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert f"{tmp_path / 'run'}: was deleted or moved while it was written to" in err
    assert len(err.splitlines()) == 1
