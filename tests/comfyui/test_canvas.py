"""A MODEL on the canvas as the engine's Network: what it predicts, beside other libraries."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from kit.checkpoints import tiny_sd2_eps, tiny_sd2_v, tiny_sd15, tiny_sdxl
from kit.comfy_host import Server, comfyui_tree
from kit.flow_model import (
    LATENT_SCALE,
    SHIFT,
    as_diffusers_sd3,
    sd3_weights,
    text_condition,
    tiny_flux,
    tiny_sd3,
)
from kit.graphs import CONTEXT, SEED, Graph, Node, error, models, noise, put, sample, unet_of
from kit.probe_nodes import condition, pooled_condition
from kit.published import kohya, lora_of, merged
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_train.families import FAMILIES
from dmd_train.method.network import Condition
from dmd_train.method.noise import Flow, per_sample
from dmd_train.networks.load import load
from dmd_train.networks.sd_load import open_sd
from dmd_train.networks.stable_diffusion import StableDiffusion

EXACT = 2e-5
"""Relative. Measured: 1e-7 to 2e-6."""
OFF = 0.01
TIMESTEPS = [999, 500, 20]
FAMILY = {"sd15": ("sd1", "eps"), "sd2v": ("sd2", "v"), "sdxl": ("sdxl", "eps")}
MAKE = {"sd15": tiny_sd15, "sd2v": tiny_sd2_v, "sdxl": tiny_sdxl}


@dataclass
class Asked:
    """What Probe_PredictX0 answered: mu, its gradient, the pictures; family and so on."""

    x_t: Tensor
    found: dict[str, Tensor]
    told: list[str]
    t: Tensor = field(default_factory=lambda: torch.tensor(TIMESTEPS))


def ask(
    server: Server,
    graph: Graph,
    model: Node | list[Any],
    conditions: Node,
    shape: tuple[int, int, int] = (4, 8, 8),
    rows: tuple[int, ...] = (0, 0, 0),
    settings: dict[str, Any] | None = None,
    **more: Node,
) -> Asked:
    """The network's mu at TIMESTEPS, one sample each."""
    x_t = noise(len(TIMESTEPS), *shape)
    given = {"x_t": x_t, "t": torch.tensor(TIMESTEPS), "row": torch.tensor(rows)}
    save_file(given, server.base / "input/asked.safetensors")
    told = yaml.safe_dump({"preset": "sd15-one-step-lora", "resolution": 64} | (settings or {}))
    probe = graph.add(
        "Probe_PredictX0",
        model=model,
        conditions=conditions,
        name="asked",
        settings=told + f"# {next(_nonce)}",
        **more,
    )
    shown = server.run(graph)["outputs"][probe.id]["text"]
    return Asked(x_t, load_file(server.base / "output/asked.safetensors"), shown)


_nonce = iter(range(10**6))


def by_diffusers(unet: UNet2DConditionModel, family: str, x_t: Tensor) -> Tensor:
    """mu of a headless network with these weights, under Probe_Conditioning's condition."""
    width, pooled_width = CONTEXT[family]
    name, prediction = FAMILY[family]
    network = StableDiffusion(
        unet,
        family=name,
        prediction=prediction,
        shape=(4, 8, 8),
        license="",
        empty={},
        decoder=None,
        latent_scale=1.0,
        downscale=8,
    )
    batch = len(x_t)
    told: Condition = {"text": condition(SEED, width).expand(batch, -1, -1)}
    if pooled_width:
        told["pooled"] = pooled_condition(SEED, pooled_width).expand(batch, -1)
    with torch.no_grad():
        return network.predict_x0(x_t, torch.tensor(TIMESTEPS), told)


@pytest.mark.parametrize("family", MAKE)
def test_a_unet_on_the_canvas_predicts_what_diffusers_predicts_of_its_file(
    server: Server, family: str
) -> None:
    graph = Graph()
    name = put(server, MAKE[family])
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    asked = ask(server, graph, loaded, graph.condition(family), vae=loaded[2])
    expected = by_diffusers(unet_of(server.base / "models/checkpoints" / name), family, asked.x_t)
    for mu, theirs in zip(asked.found["mu"], expected, strict=True):
        assert error(mu, theirs) <= EXACT
    assert asked.told[:2] == list(FAMILY[family])
    assert asked.found["image"].shape == (3, 3, 64, 64)
    assert float(asked.found["gradient"].norm()) > 0


def test_every_class_that_a_family_is_known_by_is_one_of_comfyuis() -> None:
    """A misspelt one would be passed over."""
    source = (comfyui_tree() / "comfy/supported_models.py").read_text()
    classes = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    assert {name for family in FAMILIES.values() for name in family.comfy} <= classes


@pytest.mark.parametrize(("make", "side"), [(tiny_sd2_eps, 512), (tiny_sd2_v, 768)])
def test_sd_2_is_distilled_at_the_size_that_its_kind_was_made_for(
    server: Server, make: Callable[[Path], None], side: int
) -> None:
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, make))
    empty = graph.add("DMD_EmptyLatent", model=loaded, width=0, height=0, batch_size=1)
    (latent,) = sample(server, graph, empty)
    assert latent.shape == (1, 4, side // 8, side // 8)
    headless = open_sd(server.base / "models/checkpoints" / f"{make.__name__}.safetensors")
    assert headless.native_size == side


def test_a_lora_before_the_node_is_in_what_it_predicts(server: Server) -> None:
    name = put(server, tiny_sd15)
    base = unet_of(server.base / "models/checkpoints" / name)
    lora = lora_of(base, rank=2)
    save_file(kohya(lora, alpha=1.0), models(server, "loras", "style.safetensors"))
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    patched = graph.add(
        "LoraLoaderModelOnly", model=loaded, lora_name="style.safetensors", strength_model=0.5
    )
    asked = ask(server, graph, patched, graph.condition("sd15"))
    with_lora = by_diffusers(merged(base, lora, scale=0.5 / 2), "sd15", asked.x_t)
    assert error(asked.found["mu"], with_lora) <= EXACT
    assert error(by_diffusers(base, "sd15", asked.x_t), with_lora) > OFF


def test_the_wired_model_is_untouched_while_it_lies_patched_in_memory(server: Server) -> None:
    # sampled first: ComfyUI keeps a LoRA in the weights of a loaded model
    name = put(server, tiny_sd15)
    base = unet_of(server.base / "models/checkpoints" / name)
    save_file(kohya(lora_of(base, 2), alpha=2.0), models(server, "loras", "once.safetensors"))

    def weights(graph: Graph, loaded: Node, nonce: int) -> str:
        probe = graph.add("Probe_Weights", model=loaded, nonce=nonce)
        return str(server.run(graph)["outputs"][probe.id]["text"])

    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    before = weights(graph, loaded, 0)
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    patched = graph.add(
        "LoraLoaderModelOnly", model=loaded, lora_name="once.safetensors", strength_model=1.0
    )
    text = graph.condition("sd15")
    graph.add("Probe_SaveLatent", latent=graph.ksampler(patched, text, graph.empty()), name="p")
    server.run(graph)
    plain = ask(server, graph, loaded, text).found["mu"]
    expected = by_diffusers(base, "sd15", noise(3, 4, 8, 8))
    assert error(plain, expected) <= EXACT
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    assert weights(graph, loaded, 1) == before


def test_prompts_of_different_lengths_are_told_apart_in_one_batch(server: Server) -> None:
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
    short, other = graph.condition("sd15"), graph.condition("sd15", seed=1)
    long = graph.add("ConditioningConcat", conditioning_to=other, conditioning_from=short)
    both = graph.add("ConditioningCombine", conditioning_1=short, conditioning_2=long)
    mixed = ask(server, graph, loaded, both, rows=(0, 1, 0)).found["mu"]
    first = ask(server, graph, loaded, both, rows=(0, 0, 0)).found["mu"]
    second = ask(server, graph, loaded, both, rows=(1, 1, 1)).found["mu"]
    expected = torch.stack([first[0], second[1], first[2]])
    assert error(mixed, expected) <= EXACT
    assert error(first[1:2], second[1:2]) > OFF


def test_the_negative_is_the_condition_of_row_minus_one(server: Server) -> None:
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
    text, away = graph.condition("sd15", seed=1), graph.condition("sd15")
    asked = ask(server, graph, loaded, text, rows=(-1, -1, -1), negative=away)
    base = unet_of(server.base / "models/checkpoints" / put(server, tiny_sd15))
    assert error(asked.found["mu"], by_diffusers(base, "sd15", asked.x_t)) <= EXACT


@pytest.mark.parametrize("family", ["sd15", "SD3"])
def test_gradient_checkpointing_does_not_change_the_gradient(server: Server, family: str) -> None:
    def gradient(checkpointing: bool) -> Tensor:
        graph = Graph()
        make = tiny_sd15 if family == "sd15" else tiny_sd3
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, make))
        if family == "sd15":
            text, channels = graph.condition("sd15"), 4
        else:
            text, channels = text_condition(graph, family), 16
        settings = {"gradient_checkpointing": checkpointing}
        return ask(server, graph, loaded, text, (channels, 8, 8), settings=settings).found[
            "gradient"
        ]

    assert error(gradient(True), gradient(False)) <= 1e-6


def test_a_flow_transformer_predicts_x0_as_diffusers_network_and_its_noise_have_it(
    server: Server,
) -> None:
    graph = Graph()
    name = put(server, tiny_sd3)
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    settings = {"preset": "any-one-step-lora"}
    text = text_condition(graph, "SD3")
    asked = ask(server, graph, loaded, text, (16, 8, 8), settings=settings, vae=loaded[2])
    network = as_diffusers_sd3(sd3_weights(server.base / "models/checkpoints" / name))
    flow = Flow(SHIFT["SD3"])
    sigma = flow.sigma(asked.t)
    with torch.no_grad():
        u = network(
            hidden_states=asked.x_t,
            timestep=(1000 * sigma).float(),
            encoder_hidden_states=condition(SEED, 4096).expand(3, -1, -1),
            pooled_projections=pooled_condition(SEED, 2048).expand(3, -1),
        ).sample
    assert error(asked.found["mu"], (asked.x_t - per_sample(sigma) * u).float()) <= EXACT
    assert asked.told[:2] == ["SD3", "flow"]
    assert asked.found["image"].shape == (3, 3, 64, 64)


def test_a_flux_is_told_its_guidance_through_its_own_extra_conds(server: Server) -> None:
    if server.get("/system_stats")["system"]["comfyui_version"] == "0.3.75":
        pytest.skip("0.3.75 knows a Flux of 24 heads alone, of 680 MB at the least")
    name = put(server, tiny_flux)

    def at_start(guidance: float) -> tuple[Tensor, Tensor]:
        """mu at t = 999, and the stock sampler's one step from the same noise."""
        graph = Graph()
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name=name)
        plain = text_condition(graph, "Flux")
        text = graph.add("FluxGuidance", conditioning=plain, guidance=guidance)
        empty = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=3)
        step = graph.ksampler(loaded, text, empty, sampler="euler")
        (latent,) = sample(server, graph, step)
        settings = {"preset": "any-one-step-lora"}
        asked = ask(server, graph, loaded, text, (16, 8, 8), settings=settings)
        scale, shift = LATENT_SCALE["Flux"]
        return asked.found["mu"][:1], ((latent - shift) * scale)[:1]

    (weak, weak_step), (strong, strong_step) = at_start(1.0), at_start(8.0)
    assert max(error(weak, weak_step), error(strong, strong_step)) <= EXACT
    assert error(weak, strong) > EXACT * 10


def test_the_digits_model_predicts_as_the_engine_does(server: Server) -> None:
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file="dmd_students/digits-teacher.safetensors")
    labels = graph.classes("3, 7")
    rows, settings = (1, 0, 1), {"preset": "digits-one-step", "resolution": 0}
    asked = ask(server, graph, model, labels, (1, 8, 8), rows, settings)
    network = load("digits", torch.device("cpu")).network
    # a continuous MODEL's timesteps are the engine's Karras grid between its sigmas
    with torch.no_grad():
        expected = network.predict_x0(asked.x_t, asked.t, {"label": torch.tensor([7, 3, 7])})
    assert error(asked.found["mu"], expected) <= EXACT
    assert asked.told == ["digits", "edm", "1", "8", "8"]


def test_a_few_step_model_is_refused_as_a_teacher(server: Server) -> None:
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
    lcm = graph.add("ModelSamplingDiscrete", model=loaded, sampling="lcm", zsnr=False)
    with pytest.raises(Exception, match="50 timesteps, as few-step models do"):
        ask(server, graph, lcm, graph.condition("sd15"))
