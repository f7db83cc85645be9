"""What lies in a run's folder is what was written there, or it is named and not used."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kit.crashes import contents
from kit.short_run import SHORT, config_of, train
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmd_train.config import Config
from dmd_train.errors import UserError
from dmd_train.files.mark import MARK_KEY
from dmd_train.files.read import peek, read_safetensors
from dmd_train.files.shards import Shards
from dmd_train.files.write import write_safetensors, write_text
from dmd_train.networks.load import load, save
from dmd_train.run.folder import (
    CHECKPOINT_KEY,
    SCHEMA_KEY,
    SETTINGS_KEY,
    STEP_KEY,
    TEACHER_KEY,
    TORCH_KEY,
    VERSION_KEY,
    RunFolder,
    newest_checkpoint,
)

CPU = torch.device("cpu")
OURS = {MARK_KEY, CHECKPOINT_KEY, SCHEMA_KEY, SETTINGS_KEY, TEACHER_KEY, TORCH_KEY, VERSION_KEY}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_of(tmp_path)


def checkpoint(config: Config, step: int) -> Path:
    return config.output / f"checkpoints/step-{step:08d}.safetensors"


def student(config: Config) -> Path:
    return config.output / "student.safetensors"


def flip(file: Path) -> None:
    """One bit of the last tensor."""
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4
    file.write_bytes(raw)


def rewritten(
    file: Path,
    without: set[str],
    said: dict[str, str] | None = None,
    more: dict[str, Tensor] | None = None,
) -> None:
    """The same file, whole, with other metadata and tensors."""
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in list(opened.keys())}
        metadata = opened.metadata() or {}
    kept = {key: value for key, value in metadata.items() if key not in without}
    save_file(tensors | (more or {}), file, kept | (said or {}))


def refusal(config: Config) -> str:
    """The one line that a run is refused with."""
    with pytest.raises(UserError) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_flipped_bit_in_a_checkpoint_is_named_and_the_one_before_goes_on_to_the_same_end(
    config: Config,
) -> None:
    train(config)
    whole = contents(config.output)
    shutil.rmtree(config.output)
    train(config, stop_after=3)
    flip(checkpoint(config, 3))
    notes = train(config)
    assert notes[0].startswith(f"{checkpoint(config, 3)}: its tensors are not those")
    assert "going on from step 2" in notes[1]
    assert contents(config.output) == whole


def test_an_empty_last_checkpoint_of_a_finished_run_is_made_again(config: Config) -> None:
    train(config)
    whole = contents(config.output)
    checkpoint(config, 4).write_bytes(b"")
    assert not RunFolder(config).finished
    train(config)
    assert contents(config.output) == whole


def test_a_flipped_bit_in_the_last_checkpoint_of_a_finished_run_makes_it_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config)
    whole = contents(config.output)
    flip(checkpoint(config, 4))
    assert not RunFolder(config).finished
    monkeypatch.setattr("dmd_train.run.folder.SOON_READ", 0)
    assert RunFolder(config).finished
    monkeypatch.undo()
    train(config)
    assert contents(config.output) == whole


def test_a_flipped_bit_in_the_pairs_is_named_and_they_are_made_again(config: Config) -> None:
    train(config, stop_after=1)
    file = config.output / "pairs/shard-00000.safetensors"
    before = contents(file.parent)
    flip(file)
    with pytest.raises(UserError, match="its tensors are not those that were written"):
        Shards(file.parent)
    train(config)
    assert contents(file.parent) == before


def test_a_flipped_bit_in_a_student_is_named_and_it_is_written_again(config: Config) -> None:
    train(config)
    whole = contents(config.output)
    flip(student(config))
    with pytest.raises(UserError, match="its tensors are not those that were written") as caught:
        read_safetensors(student(config))
    assert str(student(config)) in str(caught.value)
    train(config)
    assert contents(config.output) == whole


def test_a_student_of_an_earlier_step_does_not_pass_for_the_final_one(config: Config) -> None:
    train(config, stop_after=3)
    stale = student(config).read_bytes()
    train(config)
    whole = contents(config.output)
    assert RunFolder(config).finished
    student(config).write_bytes(stale)
    assert not RunFolder(config).finished
    train(config)
    assert contents(config.output) == whole


def test_a_student_of_another_run_does_not_pass_for_this_ones(
    config: Config, tmp_path: Path
) -> None:
    other = config_of(tmp_path / "other", seed=1)
    train(config)
    train(other)
    student(config).write_bytes(student(other).read_bytes())
    assert not RunFolder(config).finished


def test_a_student_names_its_step_and_checkpoint_and_a_checkpoint_its_teacher(
    config: Config,
) -> None:
    train(config)
    of_checkpoint, of_student = (peek(file)[1] for file in (checkpoint(config, 4), student(config)))
    assert of_student[STEP_KEY] == of_checkpoint[STEP_KEY] == "4"
    assert of_student[CHECKPOINT_KEY] == of_checkpoint[MARK_KEY]
    assert of_checkpoint[TEACHER_KEY] == load("digits", CPU).sha256
    assert of_checkpoint[TORCH_KEY] == torch.__version__
    assert of_checkpoint.keys() >= {SCHEMA_KEY, VERSION_KEY}


def test_the_mark_of_a_file_is_not_handed_on_with_what_it_says(tmp_path: Path) -> None:
    """Who changes tensors and keeps the metadata would write a file that is refused."""
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"x": torch.ones(3)}, {"said": "so"})
    tensors, metadata = read_safetensors(file)
    assert metadata == {"said": "so"}
    assert MARK_KEY in peek(file)[1]
    save_file({"x": 2 * tensors["x"]}, file, metadata)
    read_safetensors(file)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3, 2)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64]
)
def test_tensors_of_every_kind_and_shape_are_marked(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"x": torch.ones(shape).to(dtype)}, {})
    assert read_safetensors(file)[0]["x"].shape == shape
    marks = {peek(file)[1][MARK_KEY]}
    for name, other in (("y", shape), ("x", (*shape, 1))):
        write_safetensors(file, {name: torch.ones(other).to(dtype)}, {})
        marks.add(peek(file)[1][MARK_KEY])
    assert len(marks) == 3


def test_files_without_marks_written_before_go_on_and_are_finished(config: Config) -> None:
    train(config, stop_after=3)
    for file in config.output.rglob("*.safetensors"):
        rewritten(file, OURS if file.parent.name == "checkpoints" else OURS | {STEP_KEY})
    assert "going on from step 3" in train(config)[0]
    for file in config.output.rglob("*.safetensors"):
        rewritten(file, OURS if file.parent.name == "checkpoints" else OURS | {STEP_KEY})
    assert RunFolder(config).finished


def test_a_student_of_before_is_not_the_end_of_a_run_that_went_on_since(config: Config) -> None:
    train(config)
    rewritten(student(config), OURS | {STEP_KEY})
    assert not RunFolder(config).finished


@pytest.mark.parametrize("said", [{}, {STEP_KEY: "2"}, {STEP_KEY: "four"}, {STEP_KEY: "²"}])
def test_a_checkpoint_that_does_not_say_the_step_in_its_name_is_passed_over(
    said: dict[str, str], config: Config
) -> None:
    train(config)
    rewritten(checkpoint(config, 4), {STEP_KEY}, said)
    student(config).unlink()
    notes = train(config)
    assert "does not say that it is of step 4" in notes[0]
    assert "going on from step 2" in notes[1]


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_passed_over(config: Config) -> None:
    train(config)
    rewritten(checkpoint(config, 4), set(), {SCHEMA_KEY: "2", VERSION_KEY: "9.0"})
    student(config).unlink()
    said = refusal(config)
    assert "written by dmd-one-step 9.0" in said
    assert "Update dmd-one-step" in said


@pytest.mark.parametrize("name", ["student/x", "ema/x", "critic/x@step", "x"])
def test_a_checkpoint_with_a_weight_more_is_refused_in_one_line(name: str, config: Config) -> None:
    train(config)
    rewritten(checkpoint(config, 4), {MARK_KEY}, more={name: torch.zeros(1)})
    student(config).unlink()
    assert f"of step 4, {name} is not as this run has it" in refusal(config)


def test_a_checkpoint_with_a_weight_of_another_shape_is_refused_in_one_line(
    config: Config,
) -> None:
    train(config)
    key = next(key for key in peek(checkpoint(config, 4))[0] if "@" not in key)
    rewritten(checkpoint(config, 4), {MARK_KEY}, more={key: torch.zeros(7)})
    student(config).unlink()
    assert f"{key} is not as this run has it" in refusal(config)


def test_what_kills_left_half_written_is_swept_at_the_start_and_nothing_else(
    config: Config,
) -> None:
    train(config, stop_after=1)
    folders = ("", "checkpoints", "samples", "pairs", "text")
    left = [".run-0123456789abcdef.yaml", ".step-00000002-0123456789abcdef.png", ".tmpa1B2c3"]
    for folder in folders:
        (config.output / folder).mkdir(exist_ok=True)
        for name in left:
            (config.output / folder / name).write_bytes(b"half")
    kept = config.output / ".notes-of-mine.yaml"
    kept.write_text("mine")
    train(config)
    hidden = {path.name for path in config.output.rglob(".*")}
    assert hidden == {".lock", ".lock-export", kept.name}


@pytest.mark.parametrize("name", [".run-0123456789abcdef.yaml", ".DS_Store", "Thumbs.db", ".lock"])
def test_a_folder_that_holds_only_what_a_kill_or_a_desktop_left_is_a_new_one(
    name: str, config: Config
) -> None:
    config.output.mkdir()
    (config.output / name).write_bytes(b"")
    train(config)
    assert RunFolder(config).finished


@pytest.mark.parametrize(
    "line",
    ["3", "null", "[1]", "{}", '{"step": "1"}', '{"step": 1, "a": []}', "{", "\udcff", "[" * 99999],
    ids=range(9),
)
def test_lines_of_metrics_that_are_no_rows_are_left_out(line: str, config: Config) -> None:
    train(config, stop_after=3)
    metrics = config.output / "metrics.jsonl"
    raw = line.encode("utf-8", "surrogateescape")
    metrics.write_bytes(raw + b"\n" + metrics.read_bytes())
    train(config)
    assert [json.loads(row)["step"] for row in metrics.read_text().splitlines()] == [1, 2, 3, 4]


def teacher_file(path: Path, change: float = 0) -> str:
    """The embedded teacher as a file of its own, or another one."""
    network = load("digits", CPU).network
    with torch.no_grad():
        next(network.module.parameters()).add_(change)
    save(path, network)
    return str(path)


@pytest.mark.parametrize("weight", [0, 0.25])
def test_a_teacher_that_was_changed_under_its_name_is_refused(
    weight: float, tmp_path: Path
) -> None:
    teacher = teacher_file(tmp_path / "teacher.safetensors")
    config = config_of(tmp_path, teacher=teacher, regression_weight=weight)
    train(config, stop_after=3)
    teacher_file(tmp_path / "teacher.safetensors", 1)
    said = refusal(config)
    assert "another teacher" in said if weight else "or was changed since" in said
    teacher_file(tmp_path / "teacher.safetensors")
    assert "going on from step 3" in train(config)[0]


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path: Path) -> None:
    """Who the teacher is, is told by its file's hash."""
    said = {f"key {i}": 'a "\\\n\x7fü' * i for i in range(9)}
    tensors = {"b": torch.ones(3), "a": torch.zeros(2).half()}
    files = [tmp_path / f"{i}.safetensors" for i in range(9)]
    for file in files:
        write_safetensors(file, tensors, said)
        assert read_safetensors(file)[1] == said
    assert len({file.read_bytes() for file in files}) == 1


def test_names_are_flushed_to_the_disk_after_a_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, fsync = [], os.fsync

    def noted(handle: int) -> None:
        flushed.append((os.fstat(handle).st_ino, sorted(os.listdir(tmp_path))))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    write_text(tmp_path / "new/x.txt", "x")
    new, file = ((tmp_path / name).stat().st_ino for name in ("new", "new/x.txt"))
    assert [inode for inode, _ in flushed] == [tmp_path.stat().st_ino, file, new]


def test_verify_says_a_line_a_file_and_finds_what_is_not_whole(
    dmd: Callable, tmp_path: Path, config: Config
) -> None:
    train(config)
    outcome = dmd("verify", config.output)
    assert outcome.code == 0, outcome.out
    lines = outcome.out.splitlines()
    assert f"{student(config)}: whole, step 4" in lines
    assert any(line.startswith(f"{checkpoint(config, 2)}: whole, step 2, by") for line in lines)
    assert lines[-1] == f"{len(lines) - 1} files, none damaged"
    assert len(lines) - 1 == len(contents(config.output))

    flip(checkpoint(config, 2))
    (config.output / "samples/step-00000003.png").write_bytes(b"\x89PNG")
    (config.output / "metrics.jsonl").write_text("3\n")
    outcome = dmd("verify", config.output)
    assert outcome.code == 1
    assert f"{checkpoint(config, 2)}: its tensors are not those that were written" in outcome.out
    assert "step-00000003.png: no whole picture" in outcome.out
    assert "metrics.jsonl: 1 of 1 lines are no rows" in outcome.out
    assert outcome.out.endswith("3 damaged\n")


def test_verify_of_what_is_no_run_is_one_line(dmd: Callable, tmp_path: Path) -> None:
    outcome = dmd("verify", tmp_path / "nothing")
    assert outcome.code == 2
    assert outcome.err.endswith("nothing: holds no run.yaml. Give the folder of a run.\n")
    assert len(outcome.err.splitlines()) == 1


def test_the_newest_whole_checkpoint_is_the_one_with_the_highest_step(config: Config) -> None:
    train(config)
    found = newest_checkpoint(config.output / "checkpoints")
    assert found and found.step == SHORT["steps"]
