"""`sample` draws from a student that a run has left, by prompts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from kit.command_line import Command, Outcome, refused
from kit.crashes import contents
from kit.sd_files import Tiny
from kit.sd_runs import LEARNS, PROMPTS, SMALL, calls, encoded
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dmd_train.config import load_config
from dmd_train.networks.load import DIGITS_TEACHER
from dmd_train.networks.text import TextEncoder
from dmd_train.run.export import export
from dmd_train.run.folder import RunFolder
from dmd_train.terminal import commands as cli


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, micro: Tiny) -> Callable[[str], Path]:
    """The run folder of a student of micro("sd1"), by training."""
    parent = tmp_path_factory.mktemp("students")

    def trained(training: str) -> Path:
        run = parent / training
        if not run.exists():
            own = {"teacher": str(micro("sd1")), "preset": f"sd15-one-step-{training}"}
            values = SMALL | LEARNS | own | {"output": str(run), "prompts": str(parent / "p.txt")}
            (parent / "p.txt").write_text("\n".join(PROMPTS))
            run_yaml = parent / "run.yaml"
            run_yaml.write_text(yaml.safe_dump(values))
            cli.app(["train", str(run_yaml)], standalone_mode=False)
        return run

    return trained


def latent(path: Path) -> Tensor:
    return load_file(path)["latent_tensor"]


def test_samples_take_the_prompts_by_turns_and_another_seed_gives_others(
    student: Callable[[str], Path], dmd: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = student("lora") / "student.safetensors"
    made = calls(monkeypatch, TextEncoder, "encode")

    def drawn(name: str, *arguments: object) -> Tensor:
        outcome = dmd("sample", file, "--out", name, *arguments)
        assert outcome.code == 0, outcome.err
        return latent(tmp_path / name)

    two = ("--prompt", "a red fox", "--prompt", "a blue bird")
    both = drawn("both.latent", *two, "--count", 4)
    assert both.shape == (4, 4, 8, 8) and both.dtype == torch.float32
    assert encoded(made) == [["a red fox", "a blue bird"] * 2]
    again = drawn("again.latent", *two, "--count", 4)
    other = drawn("other.latent", *two, "--count", 4, "--seed", 1)
    fox = drawn("fox.latent", "--prompt", "a red fox", "--count", 4)
    assert torch.equal(again, both)
    assert not torch.isclose(other, both).any(dim=-1).all()
    torch.testing.assert_close(fox[[0, 2]], both[[0, 2]], rtol=1e-4, atol=1e-5)
    assert not torch.equal(fox[1], both[1])


def test_samples_are_written_over_older_ones_and_never_over_files_of_somebody_elses(
    dmd: Command, tmp_path: Path
) -> None:
    def seven(out: str, count: int = 1) -> Outcome:
        return dmd("sample", DIGITS_TEACHER, "--class", 7, "--out", out, "--count", count)

    for out in ("own.png", "own"):
        assert [seven(out).code, seven(out).code] == [0, 0]
    Image.new("RGB", (8, 8)).save("mine.png")
    Path("text.png").write_text("mine")
    Path("folder.png").mkdir()
    Path("holiday").mkdir()
    shutil.copy("mine.png", "holiday/00001.png")
    assert seven("own.npy").code == 0
    before = contents(tmp_path)
    for out in ("mine.png", "text.png", "folder.png", "own.npy"):
        refused(seven(out), f"--out {out}: is there", "Choose another name")
    refused(seven("holiday", 2), "--out holiday/00001.png: is there")
    assert contents(tmp_path) == before


def test_a_training_that_starts_meanwhile_leaves_an_export_what_it_has_written(
    student: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = student("lora")
    config = load_config(run / "run.yaml", [])
    half = run / ".student-lora-0123456789abcdef.safetensors"

    def halfway(*_: object) -> None:
        half.write_bytes(b"half")
        with RunFolder(config):
            assert half.exists()

    monkeypatch.setattr("dmd_train.run.export.write_weights", halfway)
    export(run, "lora", "fp16")
    half.unlink()


def test_a_lora_outside_its_run_folder_needs_its_base_and_no_other(
    student: Callable[[str], Path], micro: Tiny, dmd: Command, tmp_path: Path
) -> None:
    inside = student("lora") / "student.safetensors"
    moved = tmp_path / "moved.safetensors"
    shutil.copy(inside, moved)
    asked = ("--prompt", "a red fox", "--count", 1)
    refused(dmd("sample", moved, "--out", "x.latent", *asked), moved, "--base FILE")
    outcome = dmd("sample", moved, "--out", "x.latent", *asked, "--base", micro("sdxl"))
    refused(outcome, moved, "sd1", "is sdxl", "own base")
    assert not (tmp_path / "x.latent").exists()
    for name, file, base in (("x", moved, ["--base", micro("sd1")]), ("y", inside, [])):
        outcome = dmd("sample", file, "--out", f"{name}.latent", *asked, *base)
        assert outcome.code == 0, outcome.err
    assert torch.equal(latent(tmp_path / "x.latent"), latent(tmp_path / "y.latent"))


def test_a_whole_student_draws_pictures_too(
    student: Callable[[str], Path], dmd: Command, tmp_path: Path
) -> None:
    file = student("full") / "student.safetensors"
    outcome = dmd("sample", file, "--out", "x", "--prompt", "a red fox", "--count", 2)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in sorted((tmp_path / "x").iterdir())] == ["00000.png", "00001.png"]


def test_a_class_for_a_text_model_and_a_prompt_for_the_digits_are_refused(
    student: Callable[[str], Path], dmd: Command
) -> None:
    file = student("lora") / "student.safetensors"
    refused(dmd("sample", file, "--out", "x.png", "--class", 7), file, "--prompt")
    refused(dmd("sample", file, "--out", "x.png"), file, "--prompt")
    digits = DIGITS_TEACHER
    refused(dmd("sample", digits, "--out", "x.png", "--prompt", "seven"), digits, "--class 7")
    refused(dmd("sample", digits, "--out", "x.latent"), "draw pixels, not latents")
