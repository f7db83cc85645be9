"""An exported LoRA loads in ComfyUI and in diffusers, and draws there what `sample` draws."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from diffusers import (
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from kit.checkpoints import UNET, as_diffusers_unet
from kit.comfy_host import Server
from kit.command_line import Command, refused
from kit.exported import (
    EXACT,
    FAMILY,
    OFF,
    PROMPT,
    RECIPE_399,
    SEED,
    Trained,
    Ways,
    by_sample,
)
from kit.graphs import LATENT_SCALE, Graph, error, failed, models, noise, told
from safetensors.torch import load_file

from dmd_train.families import UNET_LAYERS
from dmd_train.method.lora import kohya_name
from dmd_train.networks.ldm_names import unet_names


@pytest.mark.parametrize("name", ["sd15", "sd2v", "sdxl-999"])
def test_a_lora_over_its_teacher_draws_by_stock_nodes_and_ours_what_sample_draws(
    trained: Trained, name: str
) -> None:
    run = trained(name)
    lora = run.export("lora")
    ways = Ways(run)
    teacher = ways.teacher()
    ours, stock = ways.our_lora(teacher, lora), ways.stock_lora(teacher, lora)
    ways.ksampler("stock euler, simple", stock)
    ways.ksampler("Load DMD LoRA", ours, "lcm", "normal")
    expected = by_sample(lora)
    logged = len(run.server.log())
    assert max(ways.errors(expected).values()) <= EXACT
    assert "not loaded" not in run.server.log()[logged:]  # what ComfyUI says of a key unknown to it
    assert told(ways.graph, ours) == run.says.format("kohya LoRA")


def test_an_sdxl_lora_of_timestep_399_is_right_by_its_recipe_and_wrong_without(
    trained: Trained,
) -> None:
    run = trained("sdxl")
    lora = run.export("lora")
    ways = Ways(run)
    teacher = ways.teacher()
    ours, stock = ways.our_lora(teacher, lora), ways.stock_lora(teacher, lora)
    ways.ksampler("without the recipe", stock)
    ways.ksampler("Load DMD LoRA", ours, "lcm", "normal")
    ways.ksampler("DMD Model Sampling", ways.graph.model_sampling(stock, RECIPE_399))
    expected = by_sample(lora)
    errors = ways.errors(expected)
    assert errors.pop("without the recipe") > OFF
    assert max(errors.values()) <= EXACT
    assert told(ways.graph, ours) == run.says.format("kohya LoRA")


def test_a_batch_of_two_is_what_sample_draws_for_a_count_of_two(trained: Trained) -> None:
    run = trained("sd15")
    lora = run.export("lora")
    ways = Ways(run)
    ways.ksampler("stock", ways.stock_lora(ways.teacher(), lora), count=2)
    expected = by_sample(lora, count=2)
    assert error(expected[1:], expected[:1]) > OFF
    assert max(ways.errors(expected).values()) <= EXACT


HEADS: dict[str, Any] = {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
FULL_SIZE: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768},
    "SD 2": HEADS | {"cross_attention_dim": 1024},
    "SDXL": HEADS
    | {
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""UNet2DConditionModel's arguments beside its defaults, which are SD 1's."""


def full_size(name: str) -> UNet2DConditionModel:
    """The tiny ones have no middle block, and little attention on the way up."""
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel(**FULL_SIZE[name])
    return unet


@pytest.mark.parametrize("name", FULL_SIZE)
def test_comfyui_has_both_our_names_of_every_weight_of_a_full_size_unet_in_its_table(
    server: Server, name: str
) -> None:
    unet = full_size(name)
    weights = unet.state_dict()
    names = unet_names(weights, unet.config)
    graph = Graph()
    shapes = {UNET + names[key]: list(value.shape) for key, value in weights.items()}
    probe = graph.add("Probe_UnetNames", shapes=json.dumps(shapes))
    (table,) = server.run(graph)["outputs"][probe.id]["names"]
    assert {key: table.get(key) for key in names} == names


@pytest.mark.parametrize("name", FULL_SIZE)
def test_diffusers_finds_every_layer_of_a_full_size_lora(name: str) -> None:
    unet = full_size(name)
    layers = [layer for layer, _ in unet.named_modules() if re.fullmatch(UNET_LAYERS, layer)]
    assert len(layers) > 200
    file = {
        f"{kohya_name(layer)}.{part}": torch.ones(())
        for layer in layers
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    pipeline: Any = StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(file, unet_config=unet.config)
    found = convert_unet_state_dict_to_peft(state)
    assert set(found) == {f"unet.{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    assert len(alphas) == len(layers)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_diffusers_own_loader_puts_a_lora_into_the_teachers_unet_and_draws_the_same(
    trained: Trained, name: str
) -> None:
    run = trained(name)
    lora = run.export("lora")
    unet: Any = as_diffusers_unet(run.teacher)
    pipeline: Any = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(str(lora), unet_config=unet.config)
    pipeline.load_lora_into_unet(state, alphas, unet)
    layers = sum(key.endswith(".alpha") for key in load_file(lora))
    assert sum(".lora_A." in key for key in unet.state_dict()) == layers

    condition, added = run.condition, None
    if "pooled" in condition:
        sizes = torch.tensor([[64.0, 64.0, 0, 0, 64.0, 64.0]])
        added = {"text_embeds": condition["pooled"], "time_ids": sizes}
    start, t = noise(1, 4, 8, 8, seed=SEED), torch.tensor(run.timestep)
    scheduler = LCMScheduler()
    scheduler.set_timesteps(timesteps=[run.timestep])
    with torch.no_grad():
        output = unet(start, t, condition["text"], added_cond_kwargs=added).sample
    sampled = scheduler.step(output, t, start).denoised / LATENT_SCALE[run.family]
    found = error(sampled, by_sample(lora))
    print(name, f"diffusers {found:.1e}")
    assert found <= EXACT


@pytest.mark.parametrize(("name", "over"), [("sd15", "sd2v"), ("sdxl", "sd15"), ("sd2v", "sd15")])
def test_a_lora_over_another_familys_model_is_refused_in_one_line(
    trained: Trained, dmd: Command, name: str, over: str
) -> None:
    run, other = trained(name), trained(over)
    lora = run.export("lora")
    ways = Ways(other)
    ways.ksampler("refused", ways.our_lora(ways.teacher(), lora))
    ways.graph.add("Probe_SaveLatent", latent=ways.ways["refused"], name="refused")
    failure = failed(run.server, ways.graph)
    assert failure.node_type == "DMD_LoadLoRA"
    assert failure.message == (
        f"{models(run.server, 'loras', lora.name)}: this LoRA is for {FAMILY[name]}, "
        f"the model is {FAMILY[over]}"
    )
    asked = ("--prompt", PROMPT, "--out", "x.latent", "--base", other.teacher)
    said = f"{FAMILY[name]}, but {other.teacher} is {FAMILY[over]}"
    refused(dmd("sample", lora, *asked), said)
