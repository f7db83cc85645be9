"""What cannot be done with a Stable Diffusion teacher is refused in one line."""

import errno
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.command_line import Command, WriteRun, refused
from kit.publishers import diffusers_unet, kohya_lora
from safetensors.torch import save_file

from dmd_train.files import write as files


def lora_file(path: Path) -> None:
    save_file(kohya_lora("sd1"), path)


def inpainting_file(path: Path) -> None:
    save_file(diffusers_unet("sd1", in_channels=9), path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lora_file, ["a LoRA", "Give SD 1.x"]),
        (inpainting_file, ["inpainting", "Give "]),
    ],
)
def test_a_file_that_cannot_teach_is_refused(
    make: Callable[[Path], None],
    words: list[str],
    write_sd_run: WriteRun,
    dmd: Command,
    tmp_path: Path,
) -> None:
    path = tmp_path / "models" / "wrong.safetensors"
    path.parent.mkdir()
    make(path)
    for command in ("train", "plan"):
        refused(dmd(command, write_sd_run(teacher=str(path))), path, *words)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_student_is_refused_as_a_teacher(
    training: str, write_sd_run: WriteRun, train: WriteRun, dmd: Command, tmp_path: Path
) -> None:
    student = (
        train(write_sd_run(preset=f"sd15-one-step-{training}", steps=1)) / "student.safetensors"
    )
    moved = tmp_path / "models" / "moved.safetensors"
    moved.parent.mkdir()
    student.rename(moved)
    said = "a LoRA" if training == "lora" else "already a 1-step student"
    outcome = dmd("train", write_sd_run(teacher=str(moved), output=str(tmp_path / "other")))
    refused(outcome, moved, said, "Give ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\n  \n\n", ["holds no prompts", "Write one a line, or leave `prompts` out"]),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", ["not a text file", "Write one prompt a line"]),
        (b"a\0b", ["not a text file", "Write one prompt a line"]),
        (None, ["no such file", "Write one prompt a line"]),
    ],
)
def test_a_file_without_prompts_is_refused(
    content: bytes | None, words: list[str], write_sd_run: WriteRun, dmd: Command, tmp_path: Path
) -> None:
    listed = tmp_path / "listed.txt"
    if content is not None:
        listed.write_bytes(content)
    for command in ("train", "plan"):
        refused(dmd(command, write_sd_run(prompts=str(listed))), listed, *words)


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """A Python without these packages, and with torchvision, unless it is among them."""
    spec = importlib.util.find_spec("json")
    found = importlib.util.find_spec

    def find_spec(name: str, *arguments: Any) -> Any:
        if name in missing:
            return None
        return spec if name == "torchvision" else found(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


LPIPS = {"regression_loss": "lpips", "regression_weight": 0.25}


@pytest.mark.parametrize(
    ("settings", "missing", "words"),
    [
        ({"preset": "sd2-one-step-lora"}, [], ["sd2-one-step-lora", "sd1", "sd15-one-step-lora"]),
        ({"preset": "digits-one-step"}, [], ["digits-one-step", "sd15-one-step-full"]),
        ({"preset": "sd15-onestep-lora"}, [], ["Did you mean 'sd15-one-step-lora'?"]),
        ({"resolution": 100}, [], ["resolution: 100 is no multiple of 64"]),
        (LPIPS, ["torchvision"], ["torchvision", "regression_loss: pseudo-huber"]),
        (LPIPS, [], ["vgg16-397923af.pth", "Download", "regression_loss: pseudo-huber"]),
        ({"trackers": ["wandb"]}, ["wandb"], ["trackers: wandb", "pip install wandb"]),
        ({"optimizer": "adamw-8bit"}, ["bitsandbytes"], ["adamw-8bit", "pip install bitsandbytes"]),
        ({"conditioning_timestep": 1000}, [], ["timesteps", "1000"]),
        ({"decoder": "prompts.txt"}, [], ["prompts.txt", "not a whole safetensors file"]),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_is_made(
    settings: dict[str, Any],
    missing: list[str],
    words: list[str],
    write_sd_run: WriteRun,
    dmd: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    without(monkeypatch, *missing)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    run_yaml = write_sd_run(**settings)
    refused(dmd("plan", run_yaml), *words)
    refused(dmd("train", run_yaml), *words)
    assert not (tmp_path / "run/pairs").exists() and not (tmp_path / "run/text").exists()


def test_a_decoder_that_is_no_taesd_is_refused(
    write_sd_run: WriteRun, dmd: Command, tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    save_file({"decoder.conv_in.weight": torch.zeros(4, 4)}, path)
    refused(
        dmd("train", write_sd_run(decoder=str(path))), path, "no TAESD decoder", "leave decoder out"
    )


def test_an_export_that_cannot_be_is_refused(
    write_sd_run: WriteRun, dmd: Command, train: WriteRun, tmp_path: Path
) -> None:
    run_yaml = write_sd_run(preset="sd15-one-step-full", steps=1)
    run = tmp_path / "run"
    refused(dmd("export", run, "--as", "unet"), "run.yaml", "no such file")
    run.mkdir()
    shutil.copy(run_yaml, run)
    refused(dmd("export", run, "--as", "unet"), run, "no checkpoint yet", "Train it first")
    train(run_yaml)
    refused(dmd("export", run, "--as", "lora"), run, "training: full", "--as unet")
    refused(dmd("export", run, "--as", "checkpoint"), "a folder", "--as unet")
    assert not list(run.glob("student-*"))


def test_an_export_onto_a_full_disk_is_one_line_and_leaves_the_older_export(
    write_sd_run: WriteRun, dmd: Command, train: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(write_sd_run(steps=1))
    assert dmd("export", run, "--as", "lora").code == 0
    path = run / "student-lora.safetensors"
    older, listed = path.read_bytes(), sorted(file.name for file in run.iterdir())

    def fills_the_disk(tensors: Any, temporary: Path, metadata: Any) -> None:
        Path(temporary).write_bytes(b"half of the ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "save_file", fills_the_disk)
    refused(dmd("export", run, "--as", "lora"), path, "No space left on device", "Make room")
    assert path.read_bytes() == older
    refused(dmd("export", run, "--as", "unet"), "No space left on device")
    assert sorted(file.name for file in run.iterdir()) == listed
