"""Hostile input: files, settings and options, drawn by a random number generator.

A module for each thing that is attacked. `makers` gives, by kind, what puts one input's files into
a folder. Half of the damage is to the bytes, half to what they say.
"""

import importlib
from functools import partial
from pathlib import Path

import torch
from kit.adm import adm_state
from kit.command_attempt import Maker
from kit.hostile.command_line import STUDENT, options, prompts, special
from kit.hostile.folders import decoder, pipeline_folder
from kit.hostile.pickles import any_pickle
from kit.hostile.runs import damaged_run, finished_run
from kit.hostile.settings import changes, run_yaml
from kit.hostile.weights import Weights, broken_bytes, broken_metadata, broken_weights, lying_header
from kit.sd_files import micro_pipeline

from dmd_train.files.read import read_safetensors
from dmd_train.method.lora import kohya_name
from dmd_train.method.recipe import Recipe
from dmd_train.networks.load import DIGITS_TEACHER
from dmd_train.networks.load import save as save_network

NEEDED_BY_COMMANDS = (
    "dmd_train.terminal.commands",
    "dmd_train.networks.sd_load",
    "dmd_train.networks.imagenet64",
    "dmd_train.run.curves",
    "dmd_train.run.metrics",
    "peft",
    "sklearn.datasets",
)
"""Imported once, before the first fork."""


def makers(models: Path) -> dict[str, Maker]:
    """By kind. models: an empty folder, for what is damaged copies of which."""
    for module in NEEDED_BY_COMMANDS:
        importlib.import_module(module)
    torch.set_num_threads(1)
    pipeline = micro_pipeline(models / "pipeline")
    (pipeline / "prompts.txt").write_text("a 3\n")
    unet, _ = read_safetensors(pipeline / "unet/diffusion_pytorch_model.safetensors")
    lora = _lora_of(unet)
    adm = adm_state(8, [128], 1, set(), 10)
    digits, about_digits = read_safetensors(DIGITS_TEACHER)
    student = about_digits | Recipe(
        family="digits", prediction="edm", timesteps=(999,), noise_scale=80.0
    ).to_metadata("digits", (1, 8, 8))
    own, about_own = _edm_unet(models / "edm.safetensors")
    checkpoint = _single_file(pipeline, unet)
    of_sd = ["--base", str(pipeline), "--prompt", "a red 3"]
    told = STUDENT.to_metadata("micro", (3, 64, 64))
    run = finished_run(models / "finished")
    return {
        "yaml": run_yaml,
        "set": changes,
        "options": partial(options, run),
        "prompts": partial(prompts, pipeline),
        "special": partial(special, pipeline),
        "bytes": partial(broken_bytes, DIGITS_TEACHER.read_bytes()),
        "header": partial(lying_header, digits, student),
        "student": partial(broken_weights, digits, student, []),
        "network": partial(broken_weights, own, about_own, []),
        "metadata": partial(broken_metadata, own, about_own),
        "adm": partial(broken_weights, adm, {}, []),
        "lora": partial(broken_weights, lora, told, of_sd),
        "unet": partial(broken_weights, unet, told, of_sd),
        "checkpoint": partial(broken_weights, checkpoint, told, ["--prompt", "a 3"]),
        "pickle": partial(any_pickle, adm),
        "folder": partial(pipeline_folder, pipeline),
        "decoder": partial(decoder, pipeline),
        "run": partial(damaged_run, run),
    }


def _lora_of(unet: Weights) -> Weights:
    tensors = {}
    for name in [key.removesuffix(".weight") for key in unet if key.endswith("to_k.weight")]:
        out, inside = unet[f"{name}.weight"].shape
        key = kohya_name(name)
        tensors[f"{key}.lora_down.weight"] = torch.ones(2, inside) / inside
        tensors[f"{key}.lora_up.weight"] = torch.ones(out, 2)
        tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return tensors


def _edm_unet(path: Path) -> tuple[Weights, dict[str, str]]:
    from dmd_train.networks.edm_unet import edm_unet

    network = edm_unet(
        classes=3,
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    save_network(path, network)
    return read_safetensors(path)


def _single_file(pipeline: Path, unet: Weights) -> Weights:
    """In LDM's names, with room for all of CLIP's tokens."""
    from diffusers import UNet2DConditionModel

    from dmd_train.networks.ldm_names import LDM, unet_names

    config = UNet2DConditionModel.load_config(pipeline / "unet")
    with torch.device("meta"):
        names = unet_names(unet, UNet2DConditionModel.from_config(config).config)
    weights = {LDM + names[key]: value for key, value in unet.items()}
    clip, _ = read_safetensors(pipeline / "text_encoder/model.safetensors")
    prefix = "cond_stage_model.transformer."
    few = next(key for key in clip if key.endswith("token_embedding.weight"))
    clip[few] = clip[few].repeat(49408 // len(clip[few]) + 1, 1)[:49408].half()
    return weights | {
        prefix + (key if key.startswith("text_model.") else f"text_model.{key}"): value
        for key, value in clip.items()
    }
