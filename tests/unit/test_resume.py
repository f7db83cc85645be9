"""A stopped run, continued, is the uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from kit.command_line import Command, WriteRun, run_command
from kit.runs import logged_steps, newest_step

from dmd_train.files.read import read_safetensors
from dmd_train.files.write import write_atomically, write_text

ROOT = Path(__file__).parents[2]
STEPS, INTERVAL = 160, 10
pytestmark = pytest.mark.usefixtures("few_pictures")


def start(run_yaml: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dmd_train", "train", str(run_yaml)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_checkpoint(run: Path, process: "subprocess.Popen[str]") -> None:
    while not list(run.glob("checkpoints/step-*.safetensors")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def same_weights(one: Path, other: Path) -> bool:
    """The final training state (student, critic, average, both optimisers) and the student."""
    files = [f"checkpoints/step-{STEPS:08d}.safetensors", "student.safetensors"]
    for file in files:
        a, b = read_safetensors(one / file)[0], read_safetensors(other / file)[0]
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    return True


@pytest.fixture(scope="module")
def settings() -> dict[str, int]:
    return {"steps": STEPS, "checkpoint_every": INTERVAL, "sample_every": 80}


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
    write_run: WriteRun,
    settings: dict[str, int],
) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_command("train", write_run(folder, **settings)) == 0
    return folder / "run"


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_by_a_signal_goes_on_to_bit_identical_weights(
    sent: signal.Signals,
    uninterrupted: Path,
    tmp_path: Path,
    write_run: WriteRun,
    settings: dict[str, int],
) -> None:
    run_yaml = write_run(tmp_path, **settings)
    process = start(run_yaml)
    wait_for_checkpoint(tmp_path / "run", process)
    time.sleep(0.11)
    process.send_signal(sent)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + sent, output
    said = " ".join(output.split())
    assert "stopped and saved. Go on with: " in said
    assert f"python -m dmd_train train {run_yaml}" in said
    stopped_at = newest_step(tmp_path / "run")
    assert stopped_at < STEPS
    assert logged_steps(tmp_path / "run") == list(range(1, stopped_at + 1))
    assert (tmp_path / "run/student.safetensors").exists()

    assert run_command("train", run_yaml) == 0
    assert same_weights(tmp_path / "run", uninterrupted)
    assert logged_steps(tmp_path / "run") == list(range(1, STEPS + 1))


@pytest.mark.long
def test_kill_9_loses_at_most_one_checkpoint_interval_and_says_from_where_it_goes_on(
    uninterrupted: Path,
    tmp_path: Path,
    write_run: WriteRun,
    settings: dict[str, int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_yaml = write_run(tmp_path, **settings)
    process = start(run_yaml)
    wait_for_checkpoint(tmp_path / "run", process)
    time.sleep(0.17)
    process.kill()
    process.communicate(timeout=60)
    kept = newest_step(tmp_path / "run")
    reached = logged_steps(tmp_path / "run")[-1]
    assert kept < STEPS
    assert reached - kept <= INTERVAL

    assert run_command("train", run_yaml) == 0
    assert f"going on from step {kept}" in capfd.readouterr().out
    assert same_weights(tmp_path / "run", uninterrupted)
    assert logged_steps(tmp_path / "run") == list(range(1, STEPS + 1))


@pytest.mark.long
def test_a_truncated_newest_checkpoint_is_passed_over_with_a_message(
    uninterrupted: Path,
    tmp_path: Path,
    write_run: WriteRun,
    settings: dict[str, int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    run_yaml = write_run(tmp_path, **settings)
    process = start(run_yaml)
    wait_for_checkpoint(run, process)
    while newest_step(run) < 3 * INTERVAL:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    newest = newest_step(run)
    file = run / f"checkpoints/step-{newest:08d}.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])

    assert run_command("train", run_yaml) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert f"{file}: not a whole safetensors file" in said
    assert f"going on from step {newest - INTERVAL}" in said
    assert same_weights(run, uninterrupted)


@pytest.mark.long
def test_a_finished_run_says_so_and_changes_nothing(
    uninterrupted: Path, write_run: WriteRun, dmd: Command, settings: dict[str, int]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*.safetensors")}
    outcome = dmd("train", uninterrupted.parent / "run.yaml")
    assert outcome.code == 0
    assert f"finished before, at step {STEPS}" in " ".join(outcome.out.split())
    assert before == {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*.safetensors")}


def test_a_folder_in_use_by_a_live_run_is_refused(
    tmp_path: Path, write_run: WriteRun, dmd: Command
) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run/.lock"):
        outcome = dmd("train", write_run(tmp_path))
    assert outcome.code == 2
    assert "another run is using this folder" in outcome.err


@pytest.mark.long
def test_only_the_newest_checkpoints_are_kept(uninterrupted: Path) -> None:
    files = sorted(file.name for file in (uninterrupted / "checkpoints").iterdir())
    assert files == [f"step-{step:08d}.safetensors" for step in (STEPS - INTERVAL, STEPS)]


def test_who_reads_a_file_that_is_written_anew_reads_the_old_one_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    write_text(path, "the old one")
    with path.open() as reader:
        write_text(path, "another")
        assert reader.read() == "the old one"
    assert path.read_text() == "another"


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    write_text(path, "the old one")
    flushed: list[tuple[int, str]] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: flushed.append((os.fstat(file).st_ino, path.read_text()))
    )
    write_text(path, "another")
    assert (path.stat().st_ino, "the old one") in flushed


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "student.safetensors"
    target.write_bytes(b"old")

    def dies(temporary: Path) -> None:
        temporary.write_bytes(b"half of the ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, dies)
    assert target.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]
