"""Runs on Stable Diffusion teachers by the real command line: what learns, and what is left."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.command_line import Command, WriteRun, one_line
from kit.runs import metrics, same, state
from kit.sd_files import Tiny
from kit.sd_runs import LEARNS
from safetensors.torch import load_file

from dmd_train.config import load_config
from dmd_train.files.read import hash_of, read_safetensors
from dmd_train.method.recipe import read_recipe
from dmd_train.networks.load import load_teacher
from dmd_train.prepare import carried_out, prepare
from dmd_train.presets import PRESETS, families_of
from dmd_train.run.folder import RunFolder
from dmd_train.run.sample_sheet import SampleSheet

CPU = torch.device("cpu")


PRESET_RUNS = {
    "sd15-one-step-lora": ("sd15", "sd1", "eps", {"batch_size": 2}),
    "sd15-one-step-full": ("sd15", "sd1", "eps", {}),
    "sd15-four-step-lora": ("micro", "sd1", "eps", {}),
    "sd15-two-step-lora": ("micro", "sd1", "eps", {}),
    "sdxl-four-step-lora": ("micro", "sdxl", "eps", {}),
    "sd15-dmd2": ("micro", "sd1", "eps", {}),
    "sd15-paper": ("micro", "sd1", "eps", {"regression_loss": "pseudo-huber"}),
    "sd2-one-step-lora": ("sd2-v", "sd2", "v", {"steps": 2}),
    "sdxl-one-step-lora": ("sdxl", "sdxl", "eps", {"steps": 2, "regression_warmup_steps": 1}),
    # of their true layout, three networks and their moments take 5 GB
    "sd2-one-step-full": ("micro", "sd2", "v", {}),
    "sdxl-one-step-full": ("micro", "sdxl", "eps", {"regression_warmup_steps": 2}),
}


def test_there_is_a_run_below_for_every_preset_of_stable_diffusion() -> None:
    of_files = {name for name in PRESETS if families_of(name)}
    assert PRESET_RUNS.keys() == of_files - {"digits-one-step"}


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESET_RUNS)
def test_a_few_iterations_of_a_preset_give_finite_losses_and_a_student_with_its_recipe(
    preset: str,
    tiny: Tiny,
    micro: Tiny,
    write_sd_run: WriteRun,
    dmd: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if preset != "sd15-one-step-lora":  # the sheet of one is drawn in its full width
        monkeypatch.setattr(SampleSheet.__init__, "__defaults__", (2,))
    file, family, prediction, extra = PRESET_RUNS[preset]
    teacher = micro(family) if file == "micro" else tiny(file)
    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    weights = weights if teacher.is_dir() else teacher
    before = hash_of(weights)
    settings = {"teacher": str(teacher), "preset": preset, "resolution": 64, "steps": 3} | extra
    run_yaml = write_sd_run(**settings, gradient_checkpointing=None, regression_weight=None)
    outcome = dmd("train", run_yaml)
    assert outcome.code == 0, outcome.out + outcome.err
    form = "lora" if preset.endswith("lora") else "unet"
    assert f"python -m dmd_train export {tmp_path}/run --as {form}" in one_line(outcome.out)

    run = tmp_path / "run"
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, settings["steps"] + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "critic/denoising" in rows[-1] and rows[-1]["critic/gradient_norm"] > 0
    has = PRESETS[preset].settings
    assert ("student/regression" in rows[-1]) == (has["regression_weight"] > 0)
    assert (run / "curves.png").exists()

    assert hash_of(weights) == before
    tensors, metadata = read_safetensors(run / "student.safetensors")
    recipe = read_recipe(metadata, "student")
    assert recipe
    assert (recipe.family, recipe.prediction) == (family, prediction)
    assert list(recipe.timesteps) == has.get("timesteps", [999])
    assert recipe.sampler == has.get("sampler", "stochastic")
    assert bool(recipe.stock) == (preset != "sdxl-one-step-full")
    assert recipe.teacher == teacher.stem and recipe.teacher_sha256 == before
    assert recipe.baked_guidance == has["guidance"]
    assert metadata["modelspec.resolution"] == "64x64"
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in tensors.values())
    if form == "lora":
        assert all(key.startswith("lora_unet_") for key in tensors)
    else:
        unet = {k for k in tensors if k.startswith("model.diffusion_model.")}
        assert unet == tensors.keys()
        if teacher.is_file():
            assert unet == {k for k in load_file(teacher) if k.startswith("model.diffusion_model.")}
    values = state(run)
    # as many critic tensors as the student's; without an average, no third copy
    assert {key.split("/")[0] for key in values} == {"student", "critic"} | (
        {"ema"} if form == "lora" else set()
    )


@pytest.mark.parametrize("training", ["lora", "full"])
def test_iterations_move_critic_and_student_and_nothing_of_the_teacher(
    training: str, write_sd_run: WriteRun, few_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = f"sd15-one-step-{training}"
    config = load_config(write_sd_run(preset=preset, regression_weight=0.25, **LEARNS), [])
    loaded = load_teacher(config, CPU)
    assert loaded.text
    network: Any = loaded.network
    parts = [network.module, network.decoder, *loaded.text.modules]
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    with RunFolder(config) as run:
        ready = carried_out(prepare(run, loaded), lambda _: None)
        distillation, made = ready.state, ready.pairs
        roles = distillation.roles
        start = {
            name: {k: v.detach().clone() for k, v in getattr(roles, name).parameters.items()}
            for name in ("critic", "student")
        }
        for step in range(2):
            distillation.iteration(step, made)
    for part, old in zip(parts, before, strict=True):
        now = {
            key.replace(".base_layer", ""): value
            for key, value in part.state_dict().items()
            if ".lora_" not in key
        }
        assert same(now, old)
    for name, old in start.items():
        parameters = getattr(roles, name).parameters
        assert all(not torch.equal(parameters[key], value) for key, value in old.items())
        assert (len(parameters) == len(before[0])) == (training == "full")
    assert not any(p.requires_grad for part in parts[1:] for p in part.parameters())


def test_the_student_that_is_saved_is_the_average(write_sd_run: WriteRun, train: WriteRun) -> None:
    run = train(write_sd_run(steps=6, **LEARNS))
    saved, kept = load_file(run / "student.safetensors"), state(run)
    inner = "mid_block.resnets.0.conv1.lora_B.student.weight"
    average, last = kept[f"ema/{inner}"], kept[f"student/{inner}"]
    assert (average - last).norm() > 0.01 * last.norm()
    assert torch.equal(saved["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"], average.half())
