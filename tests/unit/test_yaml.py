"""Settings in YAML: whatever is in the text, plain values or one line that names the place."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from kit.command_line import WriteRun

from dmd_train.config import dump_config, load_config, make_config, settings_in
from dmd_train.errors import LONGEST, UserError
from dmd_train.files.yaml import MOST, read_yaml

BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps: !!int x", "at line 1 (tags"),
        ("steps: !!timestamp abc", "at line 1 (tags"),
        ("steps: !!python/object/apply:os.system [touch exploded]", "at line 1 (tags"),
        (BOMB, "at line 1 (aliases"),
        ("steps: 1\nseed: *steps", "at line 2 (aliases"),
        ("steps: 1\nseed: 2\nsteps: 3", "at line 3 ('steps' is there twice)"),
        ("steps: {a: 1, a: 2}", "'a' is there twice"),
        (f"steps: {'9' * 5000}", "at line 1 (a number of too many digits)"),
        (f"steps: {'[' * 3000}", "(nested more than 20 deep)"),
        (f"steps: [{'1,' * 20_000}]", "(holds more than 10000 values)"),
        ("steps: 0x_", "(not a number)"),
        ('teacher: "\\UFFFFFFFF"', "not valid YAML"),
        ('teacher: "\\ud800"', "(a text with control characters)"),
        ('teacher: "\\e[31m"', "(a text with control characters)"),
        ("? [1]\n: 2", "(a key that is no word)"),
        ("teacher: a\n---\nteacher: b", "not valid YAML"),
        ("teacher: \x1b", "not valid YAML"),
        ("x" * (MOST + 1), "larger than 1 MB"),
    ],
)
def test_what_is_no_plain_setting_is_one_line_that_names_the_place(text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        settings_in(text, "run.yaml")
    said = str(caught.value)
    assert said.startswith("run.yaml: ") and problem in said
    assert said.isprintable() and len(said) <= LONGEST


@pytest.mark.parametrize("date", ["2024-01-31", "2024-99-99", "2024-01-31 10:00:00"])
def test_a_date_is_a_text(date: str) -> None:
    assert read_yaml(f"output: {date}", "run.yaml") == {"output": date}


def test_a_date_where_a_number_belongs_is_named(tmp_path: Path, write_run: WriteRun) -> None:
    run_yaml = write_run(tmp_path)
    with pytest.raises(UserError, match=r"steps: .*integer.*\(given: '2024-99-99'\)"):
        load_config(run_yaml, ["steps=2024-99-99"])


@pytest.mark.parametrize("value", ["!!int x", "*a", "&a 1", "[" * 3000, "9" * 5000, "{a: 1, a: 2}"])
def test_set_reads_by_the_same_rules(value: str, tmp_path: Path, write_run: WriteRun) -> None:
    with pytest.raises(UserError, match=r"^--set steps=.* not valid YAML"):
        load_config(write_run(tmp_path), [f"steps={value}"])


def test_what_a_run_writes_down_is_read_again(tmp_path: Path) -> None:
    told = {"teacher": "digits", "output": "läufe/2024-01-31 ☃", "prompts": "a: b #c"}
    config = make_config(told, "test")
    (tmp_path / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "run.yaml", []) == config


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (pipe, "not a regular file"),
        (lambda path: Path("/dev/zero"), "not a regular file"),
        (lambda path: path.parent, "not a regular file"),
        (lambda path: path.parent / ("x" * 300), "File name too long"),
        (lambda path: path, "no such file"),
    ],
)
def test_a_run_yaml_that_is_no_regular_file_is_not_opened(
    make: Callable[[Path], Path], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem):
        load_config(make(tmp_path / "run.yaml"), [])


def test_a_large_run_yaml_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "run.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="larger than 1 MB"):
        load_config(tmp_path / "run.yaml", [])
