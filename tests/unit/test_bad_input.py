"""Bad input is one line that names the file, the value and the way out; exit code 2."""

import errno
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kit.command_line import Command, WriteRun, refused
from safetensors.torch import save_file

from dmd_train.config import load_config
from dmd_train.errors import UserError
from dmd_train.files.read import read_safetensors
from dmd_train.files.write import write_atomically, write_safetensors, write_text
from dmd_train.networks.load import DIGITS_TEACHER
from dmd_train.run.folder import RunFolder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rat": 1e-4}, ["learning_rat", "Did you mean 'learning_rate'?"]),
        ({"preset": "digits-onestep"}, ["digits-onestep", "Did you mean 'digits-one-step'?"]),
        ({"steps": "many"}, ["steps", "integer", "many"]),
        ({"steps": -3}, ["steps", "greater than or equal to 1", "-3"]),
        ({"device": "gpu"}, ["device", "cuda", "gpu"]),
        ({"t_min": 900, "t_max": 100}, ["t_min (900)", "t_max (100)"]),
        ({"teacher": None}, ["teacher", "required"]),
        ({"teacher": "no/such.safetensors"}, ["no/such.safetensors", "no such file"]),
    ],
)
def test_a_bad_setting_is_named_with_its_value(
    settings: dict, words: list[str], tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    refused(dmd("train", write_run(tmp_path, **settings)), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [1, 2", ["run.yaml", "not valid YAML"]),
        ("", ["run.yaml", "holds no settings"]),
        ("- steps", ["run.yaml", "holds no settings"]),
        ("\0\1", ["run.yaml"]),
    ],
)
def test_a_run_yaml_that_is_no_settings_file_is_refused(
    text: str, words: list[str], tmp_path: Path, dmd: Command
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    refused(dmd("train", "run.yaml"), *words)


def test_a_missing_run_yaml_is_named(dmd: Command) -> None:
    refused(dmd("train", "none.yaml"), "none.yaml", "no such file")


@pytest.mark.parametrize("override", ["steps", "steps=[", "stepz=3"])
def test_a_bad_override_is_named(
    override: str, tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    refused(dmd("train", write_run(tmp_path), "--set", override), "step")


class Bomb:
    """A pickle that would write a file when loaded."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


def make_truncated(path: Path) -> None:
    path.write_bytes(DIGITS_TEACHER.read_bytes()[:-5000])


def make_text(path: Path) -> None:
    path.write_text("this is not a model")


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def make_zip_pickle(path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, path)


def make_foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def make_misfit(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(DIGITS_TEACHER, "pt") as file:
        metadata = file.metadata()
    save_file({"weight": torch.zeros(2)}, path, metadata)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_truncated, ["not a whole safetensors file", "again"]),
        (make_text, ["not a whole safetensors file"]),
        (make_empty, ["not a whole safetensors file"]),
        (make_pickle, ["pickled", "Convert it"]),
        (make_zip_pickle, ["pickled", "Convert it"]),
        (make_foreign, ["keys such as weight", "written by dmd_train"]),
        (make_misfit, ["do not fit"]),
    ],
)
@pytest.mark.parametrize("command", ["train", "sample", "evaluate"])
def test_a_file_that_is_no_model_of_ours_is_refused_and_runs_nothing(
    command: str,
    make: Callable[[Path], None],
    words: list[str],
    tmp_path: Path,
    dmd: Command,
    write_run: WriteRun,
) -> None:
    make(tmp_path / "model.safetensors")
    arguments = {
        "train": ["train", write_run(tmp_path, teacher="model.safetensors")],
        "sample": ["sample", "model.safetensors", "--out", "out.png"],
        "evaluate": ["evaluate", "model.safetensors"],
    }
    refused(dmd(*arguments[command]), "model.safetensors", *words)
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("label", [-1, 10])
def test_a_class_out_of_range_is_refused_with_the_range(label: int, dmd: Command) -> None:
    outcome = dmd("sample", DIGITS_TEACHER, "--class", label, "--out", "x.png")
    refused(outcome, f"--class {label}", "0 to 9")
    assert not Path("x.png").exists()


@pytest.mark.parametrize("out", ["x.jpg", "x.safetensors"])
def test_an_output_of_another_kind_is_refused(out: str, dmd: Command) -> None:
    refused(dmd("sample", DIGITS_TEACHER, "--out", out), out, ".png")


@pytest.mark.parametrize("output", ["/proc/run", "run.yaml/run", "run.yaml"])
def test_an_output_folder_that_cannot_be_written_is_refused(
    output: str, tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    run_yaml = write_run(tmp_path, output=output)
    before = run_yaml.read_bytes()
    refused(dmd("train", run_yaml), output, "Choose another")
    assert run_yaml.read_bytes() == before


def test_a_folder_with_other_files_is_left_alone(
    tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("years of work")
    refused(dmd("train", write_run(tmp_path)), "holds other files")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_run_begun_with_other_settings_is_not_taken_up(
    tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    assert dmd("train", write_run(tmp_path, steps=2)).code == 0
    refused(dmd("train", write_run(tmp_path, steps=2, seed=1)), "seed: 0", "now it is 1")


@pytest.mark.parametrize(
    "setting",
    [
        {"learning_rate": 1e-3},
        {"batch_size": 5},
        {"guidance": 2.0},
        {"ema_decay": 0.0},
        {"steps": 41},
        {"pairs": 21},
        {"teacher": "another"},
        {"prompts": "another.txt"},
    ],
    ids=str,
)
def test_a_setting_that_changes_what_is_learned_is_not_changed_when_a_run_goes_on(
    setting: dict[str, object], tmp_path: Path, write_run: WriteRun
) -> None:
    with RunFolder(load_config(write_run(tmp_path), [])):
        pass
    (key,) = setting
    again = RunFolder(load_config(write_run(tmp_path, **setting), []))
    with pytest.raises(UserError, match=f"was begun with {key}: "), again:
        pass


def test_a_setting_that_does_not_change_what_is_learned_may_be_another_when_a_run_goes_on(
    tmp_path: Path, write_run: WriteRun
) -> None:
    free = {
        "device": "cpu",
        "cpu_threads": 2,
        "micro_batch_size": 1,
        "gradient_checkpointing": True,
        "checkpoint_every": 3,
        "sample_every": 3,
        "trackers": ["tensorboard"],
    }
    with RunFolder(load_config(write_run(tmp_path), [])):
        pass
    with RunFolder(load_config(write_run(tmp_path, **free), [])) as run:
        now = load_config(run.path / "run.yaml", []).model_dump()
    assert free.items() <= now.items()


def test_a_run_goes_on_under_another_spelling_of_the_path_of_its_prompts(
    tmp_path: Path, write_run: WriteRun
) -> None:
    for spelling in ("lists/prompts.txt", "./lists//prompts.txt"):
        with RunFolder(load_config(write_run(tmp_path, prompts=spelling), [])) as run:
            assert load_config(run.path / "run.yaml", []).prompts == "lists/prompts.txt"


@pytest.mark.parametrize("interval", [10, 1000])
def test_a_non_finite_loss_stops_the_run_names_the_network_and_keeps_the_last_checkpoint(
    interval: int, tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    """A learning rate that grows with the warm-up until the weights overflow."""
    settings = {"learning_rate": 1e4, "warmup_steps": 0, "schedule": "constant"}
    run_yaml = write_run(tmp_path, steps=400, checkpoint_every=interval, **settings)
    outcome = dmd("train", run_yaml)
    refused(outcome, tmp_path / "run", " step ", "learning_rate")
    assert "student: " in outcome.err or "critic: " in outcome.err
    for file in (tmp_path / "run/checkpoints").glob("*"):
        from dmd_train.files.read import read_safetensors

        assert all(tensor.isfinite().all() for tensor in read_safetensors(file)[0].values())


def test_a_safetensors_file_whose_header_length_begins_like_a_pickle_is_read(
    tmp_path: Path,
) -> None:
    """Header lengths are multiples of 8: one file in 32 begins with a pickle's 0x80."""
    path = tmp_path / "x.safetensors"
    for length in range(300):
        save_file({"x": torch.zeros(1)}, path, {"note": "-" * length})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert list(read_safetensors(path)[0]) == ["x"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    path.write_bytes(b"old")

    def fills_the_disk(temporary: Path) -> None:
        temporary.write_bytes(b"half of the ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError) as caught:
        write_atomically(path, fills_the_disk)
    message = str(caught.value)
    assert message.startswith(f"{path}: not written (No space left on device). Make room")
    assert "\n" not in message
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_has_the_permissions_of_any_new_file_and_no_umask_is_set_for_it(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "any").touch()
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            write_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, {})
            write_text(tmp_path / "x.txt", "x")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes.keys() == {"any", "x.safetensors", "x.txt"}
    assert set(modes.values()) == {modes["any"]}


def test_safetensors_own_error_about_a_full_disk_is_one_line_too(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large") as caught:
            write_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_when_the_losses_are_logged_is_one_line(
    tmp_path: Path, write_run: WriteRun
) -> None:
    with RunFolder(load_config(write_run(tmp_path), [])) as run:
        run.metrics.symlink_to("/dev/full")
        with pytest.raises(UserError, match="No space left on device") as caught:
            run.log([{"step": 1}])
    assert str(run.metrics) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("out", ["run.yaml/x.png", "/proc/x.npy", "run.yaml/folder"])
def test_an_output_that_cannot_be_written_is_refused(
    out: str, tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    before = write_run(tmp_path).read_bytes()
    refused(dmd("sample", DIGITS_TEACHER, "--out", out), out, "cannot be written", "Choose another")
    assert (tmp_path / "run.yaml").read_bytes() == before


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_no_generator_takes_is_refused(seed: int, dmd: Command) -> None:
    code, out, err = dmd("sample", DIGITS_TEACHER, "--seed", seed, "--out", "x.png")
    assert code == 2
    assert "Traceback" not in out + err
    assert "--seed" in err
    assert not Path("x.png").exists()
