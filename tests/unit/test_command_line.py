"""What is typed: every wrong option is one line, and no file of somebody else's is written over."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kit import command_line
from kit.command_line import Command, Outcome, WriteRun
from kit.sd_files import Tiny
from safetensors.torch import save_file

from dmd_train.files.read import peek
from dmd_train.networks.load import DIGITS_TEACHER


def refused(outcome: Outcome, *words: object) -> None:
    """Asserts exit code 2 and one short printable line that says all of `words`."""
    command_line.refused(outcome, *words)
    assert outcome.err.strip().isprintable() and len(outcome.err) <= 1100


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--count", 10**9), "--count"),
        (("--count", 10**30), "--count"),
        (("--count", "9" * 5000), "--count"),
        (("--count", "many\n\x1b[31m"), "--count"),
        (("--seed", 2**64), "--seed"),
        (("--class", "x" * 100_000), "--class"),
        (("--\x1b[31mcount", 1), r"\x1b[31m"),
    ],
)
def test_a_wrong_option_is_one_line(options: tuple[object, ...], word: str, dmd: Command) -> None:
    refused(dmd("sample", DIGITS_TEACHER, *options, "--out", "x.png"), word)
    assert not Path("x.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("sample", DIGITS_TEACHER),
        ("train",),
        ("train", "x" * 300),
        ("train", "\x1b[31m.yaml"),
        ("train", "\ud800.yaml"),
        ("evaluate", "x" * 5000),
        ("evaluate", DIGITS_TEACHER, "--seed", 2**64),
        ("teacher", "digits", "--out", "t.safetensors", "--steps", 10**30),
        ("teacher", "digits", "--out", "t.safetensors", "--seed", 2**64),
        ("export", "none", "--as", "gguf"),
        ("export", "x" * 300, "--as", "lora"),
    ],
)
def test_a_command_that_cannot_be_is_one_line(arguments: tuple[object, ...], dmd: Command) -> None:
    refused(dmd(*arguments))
    assert not list(Path().iterdir())


def test_help_is_shown_for_no_arguments_at_all(dmd: Command) -> None:
    assert "Usage" in "".join(map(str, dmd()))
    assert dmd("--help").code == 0


@pytest.mark.parametrize("prompt", ["\ud800", "a\0b", "x" * 10_001])
def test_a_prompt_that_no_encoder_can_be_told_is_refused(
    prompt: str, tiny: Tiny, dmd: Command
) -> None:
    teacher = tiny("sd15")
    refused(dmd("sample", teacher, "--prompt", prompt, "--out", "x.png"), "--prompt: the prompt")


@pytest.mark.parametrize("line", ["x" * 50_000_000, "a\0b"])
def test_a_list_with_a_line_that_is_no_prompt_is_refused(
    line: str, tmp_path: Path, tiny: Tiny, dmd: Command, write_run: WriteRun
) -> None:
    (tmp_path / "list.txt").write_text(f"a fox\n{line}\n")
    teacher = tiny("sd15")
    told = {"teacher": str(teacher), "preset": "sd15-one-step-lora", "prompts": "list.txt"}
    refused(dmd("plan", write_run(tmp_path, **told)), "list.txt: ")


@pytest.mark.parametrize("output", [".", "", "./.", "../{folder}"])
def test_a_run_is_not_written_over_the_file_that_tells_it(
    output: str, tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    run_yaml = write_run(tmp_path, output=output.format(folder=tmp_path.name))
    before = run_yaml.read_bytes()
    for command in ("train", "pairs", "plan"):
        refused(dmd(command, "run.yaml"), "output: ", "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert run_yaml.read_bytes() == before


def test_a_run_goes_on_by_the_run_yaml_in_its_own_folder(
    tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    assert dmd("pairs", write_run(tmp_path, steps=2)).code == 0
    assert dmd("train", tmp_path / "run/run.yaml").code == 0
    assert (tmp_path / "run/student.safetensors").exists()


def thesis(path: Path) -> None:
    path.write_text("years of work")


def checkpoint(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, {"modelspec.title": "mine"})


@pytest.mark.parametrize("make", [thesis, checkpoint, Path.mkdir])
def test_out_is_never_written_over_a_file_of_somebody_elses(
    make: Callable[[Path], None], tmp_path: Path, dmd: Command, write_run: WriteRun
) -> None:
    out = tmp_path / "mine.safetensors"
    make(out)
    before = out.read_bytes() if out.is_file() else None
    refused(dmd("teacher", "digits", "--out", out, "--steps", 1), out, "Choose another name")
    refused(dmd("export", tmp_path, "--as", "lora", "--out", out), out, "Choose another name")
    assert (out.read_bytes() if out.is_file() else None) == before


def test_a_teacher_is_written_over_an_older_one(tmp_path: Path, dmd: Command) -> None:
    out = tmp_path / "teacher.safetensors"
    sizes = []
    for seed in (0, 2**64 - 1):
        assert dmd("teacher", "digits", "--out", out, "--steps", 1, "--seed", seed).code == 0
        sizes.append(peek(out)[0])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"pairs": 10**7}, "pairs: 10000000"),
        ({"lora_rank": 4096, "training": "lora"}, "lora_rank: 4096"),
        ({"batch_size": 65536}, "batch_size: 65536"),
        ({"pair_batch_size": 65536}, "pair_batch_size: 65536"),
    ],
)
def test_what_cannot_fit_is_named_before_the_first_pair_is_made(
    settings: dict[str, object],
    word: str,
    tmp_path: Path,
    dmd: Command,
    write_run: WriteRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dmd_train.room.memory_of", lambda device: 10 << 20)
    monkeypatch.setattr("dmd_train.room.disk_room", lambda folder: 10 << 20)
    refused(dmd("train", write_run(tmp_path, **settings)), word, "Choose")
    assert not (tmp_path / "run/pairs").exists()


def test_an_error_of_the_disk_that_nobody_foresaw_is_one_line(
    dmd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error", "a\nfile")

    monkeypatch.setattr("dmd_train.terminal.commands.load", fails)
    refused(dmd("evaluate", "x.safetensors"), r"a\nfile: Input/output error")
