"""An exported UNet or checkpoint loads in ComfyUI and draws there what `sample` draws."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from kit.checkpoints import UNET
from kit.command_line import Command, refused
from kit.exported import (
    EXACT,
    OFF,
    PROMPT,
    RECIPE_399,
    SEED,
    TYPES,
    Trained,
    Ways,
    by_sample,
)
from kit.graphs import Node, told
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.mark.parametrize("name", ["sd15", "sd15-full", "sd2v", "sdxl"])
def test_a_unet_draws_by_stock_nodes_and_ours_what_sample_draws(
    trained: Trained, name: str
) -> None:
    run = trained(name)
    file = run.export("unet")
    ways = Ways(run)
    stock = ways.graph.add("UNETLoader", unet_name=file.name, weight_dtype="default")
    check(ways, stock, "unet", file)


@pytest.mark.parametrize("name", ["sd15", "sd15-full", "sd2v", "sdxl"])
def test_a_checkpoint_draws_by_stock_nodes_and_ours_what_sample_draws_without_a_base(
    trained: Trained, name: str, tmp_path: Path
) -> None:
    run = trained(name)
    file = run.export("checkpoint")
    ways = Ways(run)
    stock = ways.graph.add("CheckpointLoaderSimple", ckpt_name=file.name)
    alone = tmp_path / "alone" / file.name
    alone.parent.mkdir()
    os.link(file, alone)
    check(ways, stock, "checkpoint", alone)


def check(ways: Ways, stock: Node, form: str, file: Path) -> None:
    """A loaded student, and the same by Load DMD Checkpoint, against `sample` on `file`."""
    run, ours = ways.run, ways.ours(form, file)
    if run.timestep == 399:
        ways.ksampler("without the recipe", stock)
        stock = ways.graph.model_sampling(stock, RECIPE_399)
    ways.ksampler("stock", stock)
    ways.ksampler("Load DMD Checkpoint", ours, "lcm", "normal")
    expected = by_sample(file)
    errors = ways.errors(expected)
    assert errors.pop("without the recipe", 1.0) > OFF
    assert max(errors.values()) <= EXACT
    layout = "LDM UNet" if form == "unet" else "LDM single file with CLIP and VAE"
    assert told(ways.graph, ours) == run.says.format(layout)


def test_the_vae_of_a_checkpoint_decodes_as_its_teachers(trained: Trained) -> None:
    run = trained("sd15")
    file = run.export("checkpoint")
    ways = Ways(run)
    loaders = [
        ways.teacher(),
        ways.graph.add("CheckpointLoaderSimple", ckpt_name=file.name),
        ways.ours("checkpoint", file),
    ]
    latent = ways.graph.ksampler(loaders[1], ways.text, ways.graph.empty(), seed=SEED)
    for loader in loaders:
        image = ways.graph.add("VAEDecode", samples=latent, vae=loader[2])
        ways.graph.add("SaveImage", images=image, filename_prefix="vae")
    pictures = run.server.output_files(run.server.run(ways.graph))
    assert len(pictures) == 3
    assert len({picture.read_bytes() for picture in pictures}) == 1


@pytest.mark.parametrize("dtype", TYPES)
def test_text_encoder_and_vae_in_a_checkpoint_of_any_dtype_are_the_teachers_bit_for_bit(
    trained: Trained, dtype: str
) -> None:
    run = trained("sd15")
    teacher, student = load_file(run.teacher), load_file(run.export("checkpoint", dtype))
    assert student.keys() == teacher.keys()
    beside = {key for key in teacher if not key.startswith(UNET)}
    assert beside
    for key in beside:
        assert student[key].dtype == teacher[key].dtype
        assert torch.equal(student[key], teacher[key])


def test_a_lora_or_a_unet_alone_needs_its_base_named_and_a_checkpoint_needs_none(
    trained: Trained, dmd: Command, tmp_path: Path
) -> None:
    run = trained("sd15")
    drawn = {}
    for form in ("lora", "unet", "checkpoint"):
        file = tmp_path / form / f"{form}.safetensors"
        file.parent.mkdir()
        shutil.copy(run.export(form), file)
        if form == "checkpoint":
            drawn[form] = by_sample(file)
            continue
        outcome = dmd("sample", file, "--prompt", PROMPT, "--out", "x.latent")
        refused(outcome, f"{file}: a ", "--base FILE")
        drawn[form] = by_sample(file, "--base", run.teacher)
    for form, latent in drawn.items():
        assert torch.equal(latent, by_sample(run.export(form)))


def test_a_full_run_has_no_lora_to_export_and_says_so_in_one_line(
    trained: Trained, dmd: Command
) -> None:
    run = trained("sd15-full")
    out = run.folder / "refused.safetensors"
    outcome = dmd("export", run.folder, "--as", "lora", "--out", out)
    refused(outcome)
    assert outcome.err.strip() == (
        f"error: {run.folder}: was trained with training: full, so there is no LoRA. "
        "Use --as unet or --as checkpoint."
    )
    assert not out.exists()


@pytest.mark.parametrize(("name", "form"), [("sd15", "lora"), ("sd15-full", "unet")])
def test_an_export_in_fp16_is_the_student_that_training_left_bit_for_bit(
    trained: Trained, name: str, form: str
) -> None:
    """Of a run with an average, that average."""
    run = trained(name)
    left, exported = run.folder / "student.safetensors", run.export(form)
    expected, found = load_file(left), load_file(exported)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value)
    with safe_open(left, "pt") as one, safe_open(exported, "pt") as other:
        assert one.metadata() == other.metadata()
