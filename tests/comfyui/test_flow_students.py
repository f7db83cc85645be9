"""Students of flow-matching transformers, which start from pure noise at sigma = 1 as they are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from kit.checkpoints import UNET, tiny_sd15
from kit.comfy_host import PromptFailed, Server
from kit.flow_model import (
    LATENT_SCALE,
    SHIFT,
    as_diffusers_sd3,
    flow_lora,
    flow_recipe,
    merged,
    sd3_weights,
    text_condition,
    tiny_flux,
    tiny_sd3,
)
from kit.graphs import SEED, Graph, Node, error, failed, models, noise, put, sample, told
from kit.probe_nodes import condition, pooled_condition
from kit.published import ldm_unet
from kit.tiny import Exact
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_train.method.network import Condition
from dmd_train.method.noise import Flow
from dmd_train.method.recipe import Recipe
from dmd_train.method.sample import sample_euler

EXACT = 1e-4
OFF = 0.01


def base_of(server: Server) -> Path:
    return models(server, "checkpoints", put(server, tiny_sd3))


def put_lora(server: Server, name: str, lora: dict[str, Tensor], own: Recipe) -> str:
    metadata = own.to_metadata("a student", (16, 64, 64))
    save_file(lora, models(server, "loras", name), metadata)
    return name


@torch.no_grad()
def one_step(weights: dict[str, Tensor]) -> Tensor:
    """x0 = z - u(z, t = 1000) by diffusers' network, as a LATENT of ComfyUI's."""
    z = noise(1, 16, 8, 8)
    u = as_diffusers_sd3(weights)(
        z,
        timestep=torch.tensor([1000.0]),
        encoder_hidden_states=condition(SEED, 4096),
        pooled_projections=pooled_condition(SEED, 2048),
    ).sample
    return as_latent(z - u)


def as_latent(x0: Tensor) -> Tensor:
    scale, shift = LATENT_SCALE["SD3"]
    return x0 / scale + shift


def euler_step(graph: Graph, model: Node | list, text: Node) -> Node:
    return graph.ksampler(model, text, graph.empty(), sampler="euler")


def test_one_step_of_the_stock_sampler_on_a_flow_model_is_noise_less_the_velocity(
    server: Server,
) -> None:
    lone = models(server, "diffusion_models", "lone_sd3.safetensors")
    tiny_sd3(lone)
    graph = Graph()
    text = text_condition(graph, "SD3")
    loaders = (
        graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd3)),
        graph.add("UNETLoader", unet_name=lone.name, weight_dtype="default"),
    )
    sampled = sample(server, graph, *(euler_step(graph, loader, text) for loader in loaders))
    expected = one_step(sd3_weights(lone))
    assert max(error(latent, expected) for latent in sampled) <= EXACT


def test_the_engines_euler_with_guidance_is_the_stock_samplers(server: Server) -> None:
    network = as_diffusers_sd3(sd3_weights(base_of(server)))

    def mean(x: Tensor, _: Tensor, sigma: Tensor, told: Condition) -> Tensor:
        """mu = x_t - sigma u, of the texts that these seeds draw."""
        seeds = told["label"].tolist()
        u = network(
            x.float(),
            timestep=1000 * sigma.flatten().float(),
            encoder_hidden_states=torch.cat([condition(seed, 4096) for seed in seeds]),
            pooled_projections=torch.cat([pooled_condition(seed, 2048) for seed in seeds]),
        ).sample
        return x - sigma * u

    teacher = Exact(mean, (16, 8, 8), Flow(SHIFT["SD3"]))
    negative = 3
    teacher.null_condition = lambda told: {"label": torch.full_like(told["label"], negative)}  # type: ignore[method-assign]
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd3))
    (stock,) = sample(
        server,
        graph,
        graph.ksampler(
            loaded,
            text_condition(graph, "SD3"),
            graph.empty(),
            steps=5,
            sampler="euler",
            cfg=4.5,
            negative=text_condition(graph, "SD3", negative),
        ),
    )
    ours = sample_euler(teacher, noise(1, 16, 8, 8), {"label": torch.tensor([SEED])}, 5, 4.5)
    assert error(as_latent(ours), stock) <= EXACT


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_lora_of_a_flow_model_equals_its_weights_merged_by_hand_in_every_sampler(
    server: Server, strength: float
) -> None:
    weights = sd3_weights(base_of(server))
    lora = flow_lora(weights)
    file = put_lora(server, "sd3_student.safetensors", lora, flow_recipe())
    graph = Graph()
    plain = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd3))
    loaded = graph.add("DMD_LoadLoRA", model=plain, file=file, strength=strength)
    shifted = graph.add("ModelSamplingSD3", model=loaded, shift=1.73)
    sockets, text = graph.model_sampling(loaded), text_condition(graph, "SD3")
    graph.add("Probe_Sigmas", sigmas=sockets[2])
    sampled = sample(
        server,
        graph,
        graph.one_step(loaded, text),
        graph.one_step(shifted, text),
        graph.sampler_custom(sockets[0], sockets[1], sockets[2], text, graph.empty()),
        *(
            graph.ksampler(model, text, graph.empty(), sampler=sampler, scheduler=scheduler)
            for model, sampler, scheduler in (
                (loaded, "euler", "simple"),
                (loaded, "lcm", "normal"),
                (loaded, "dpmpp_2m", "sgm_uniform"),
                (shifted, "euler_ancestral", "beta"),
            )
        ),
    )
    assert told(graph, loaded) == "SD3, kohya LoRA: 1 step at t = 999; licence CC0"
    assert [1.0, 0.0] in [shown.get("sigmas") for shown in graph.shown.values()]
    expected = one_step(merged(weights, lora, strength))
    assert error(one_step(weights), expected) > OFF
    assert max(error(latent, expected) for latent in sampled) <= EXACT


@torch.no_grad()
@pytest.mark.parametrize(("kind", "stock"), [("stochastic", "lcm"), ("deterministic", "euler")])
def test_several_steps_of_a_flow_model_go_by_the_shift_that_they_were_trained_with(
    server: Server, kind: str, stock: str
) -> None:
    weights = sd3_weights(base_of(server))
    lora, own = flow_lora(weights), flow_recipe("SD3", 999, 749, 499, 249)
    own = own.model_copy(update={"sampler": kind, "shift": 5.0})
    file = put_lora(server, f"sd3_{kind}.safetensors", lora, own)
    graph = Graph()
    text = text_condition(graph, "SD3")
    empty = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    plain = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd3))
    loaded = graph.add("DMD_LoadLoRA", model=plain, file=file, strength=1.0)
    shifted = graph.add("ModelSamplingSD3", model=loaded, shift=1.73)
    sockets = graph.model_sampling(loaded)
    between, *sampled = sample(
        server,
        graph,
        graph.step_noise(empty, 3),
        graph.one_step(loaded, text),
        graph.one_step(shifted, text),
        graph.sampler_custom(sockets[0], sockets[1], sockets[2], text, empty),
        graph.ksampler(loaded, text, empty, steps=4, sampler=stock),
    )
    network, x = as_diffusers_sd3(merged(weights, lora, 1.0)), noise(1, 16, 8, 8)
    fresh, sigmas = iter(between), (1.0, 15 / 16, 5 / 6, 5 / 8, 0.0)
    for sigma, after in pairwise(sigmas):
        u = network(
            x,
            timestep=torch.tensor([1000 * sigma]),
            encoder_hidden_states=condition(SEED, 4096),
            pooled_projections=pooled_condition(SEED, 2048),
        ).sample
        eps = next(fresh) if kind == "stochastic" and after else x + (1 - sigma) * u
        x = (1 - after) * (x - sigma * u) + after * eps
    assert max(error(latent, as_latent(x)) for latent in sampled) <= EXACT


def test_a_stock_lora_and_ours_on_a_flow_model_add_up(server: Server) -> None:
    weights = sd3_weights(base_of(server))
    lora = flow_lora(weights)
    file = put_lora(server, "sd3_student.safetensors", lora, flow_recipe())
    save_file(lora, models(server, "loras", "style.safetensors"))
    graph = Graph()
    styled = graph.add(
        "LoraLoaderModelOnly",
        model=graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd3)),
        lora_name="style.safetensors",
        strength_model=0.25,
    )
    loaded = graph.add("DMD_LoadLoRA", model=styled, file=file, strength=1.0)
    (sampled,) = sample(server, graph, graph.one_step(loaded, text_condition(graph, "SD3")))
    assert error(sampled, one_step(merged(weights, lora, 1.25))) <= EXACT


@pytest.mark.parametrize("whole", [False, True], ids=["lone diffusion model", "with its VAE"])
def test_a_whole_student_of_a_flow_model_is_sampled_by_the_recipe_in_its_file(
    server: Server, whole: bool
) -> None:
    base = base_of(server)
    metadata = flow_recipe().to_metadata("a student", (16, 64, 64))
    folder = "checkpoints" if whole else "diffusion_models"
    path = models(server, folder, f"sd3_student_{whole}.safetensors")
    tensors = {k: v for k, v in load_file(base).items() if whole or k.startswith(UNET)}
    save_file(tensors, path, metadata)
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"{folder}/{path.name}")
    text = text_condition(graph, "SD3")
    latent = graph.one_step(loaded, text)
    image = graph.add("VAEDecode", samples=latent, vae=loaded[2])
    picture = graph.add("SaveImage", images=image, filename_prefix="flow")
    ours, stock = sample(server, graph, latent, euler_step(graph, loaded, text))
    layout = "single file with VAE" if whole else "diffusion model"
    assert told(graph, loaded) == f"SD3, {layout}: 1 step at t = 999; licence CC0"
    assert (picture.id in graph.shown) == whole
    expected = one_step(sd3_weights(base))
    assert max(error(ours, expected), error(stock, expected)) <= EXACT


def test_a_flow_student_is_told_its_guidance_by_the_stock_node(server: Server) -> None:
    """Flux's embedded guidance is a condition like others; the recipe leaves it alone."""
    if server.get("/system_stats")["system"]["comfyui_version"] == "0.3.75":
        pytest.skip("knows Flux of 24 heads alone, 340 M parameters a block")
    name = put(server, tiny_flux)
    weights = sd3_weights(models(server, "checkpoints", name))
    lora = flow_lora(weights, ("img_in", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear2"))
    file = put_lora(server, "flux_student.safetensors", lora, flow_recipe("Flux"))
    graph = Graph()
    plain = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    loaded = graph.add("DMD_LoadLoRA", model=plain, file=file, strength=1.0)
    text = text_condition(graph, "Flux")
    low, high = (
        graph.add("FluxGuidance", conditioning=text, guidance=guidance) for guidance in (1.0, 9.0)
    )
    ours, stock, without, other = sample(
        server,
        graph,
        graph.one_step(loaded, low),
        euler_step(graph, loaded, low),
        euler_step(graph, plain, low),
        graph.one_step(loaded, high),
    )
    assert told(graph, loaded).startswith("Flux, kohya LoRA: 1 step at t = 999;")
    assert error(ours, stock) <= EXACT
    assert error(without, stock) > OFF and error(other, ours) > OFF


def refusal(server: Server, graph: Graph, model: Node) -> PromptFailed:
    graph.add("Probe_Sigmas", sigmas=graph.model_sampling(model)[2])
    return failed(server, graph)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (flow_recipe("Flux"), "this LoRA is for Flux, the model is SD3"),
        (flow_recipe("SD3", 599), "a flow model (SD3) begins at t = 999 alone"),
        (
            flow_recipe().model_copy(update={"noise_scale": 8.0}),
            "starts from noise of 8 at sigma = 1",
        ),
        (flow_recipe().model_copy(update={"prediction": "eps"}), "has no timesteps 0 to 999"),
    ],
)
def test_a_recipe_that_a_flow_model_does_not_fit_is_refused_in_one_line(
    server: Server, own: Recipe, says: str
) -> None:
    lora = flow_lora(sd3_weights(base_of(server)))
    file = put_lora(server, "unfit.safetensors", lora, own)
    graph = Graph()
    plain = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd3))
    loaded = graph.add("DMD_LoadLoRA", model=plain, file=file, strength=1.0)
    failure = refusal(server, graph, loaded)
    assert failure.node_type == "DMD_LoadLoRA"
    assert says in failure.message


def test_a_flow_students_lora_on_stable_diffusion_is_refused_in_one_line(server: Server) -> None:
    lora = flow_lora(sd3_weights(base_of(server)))
    file = put_lora(server, "for_sd3.safetensors", lora, flow_recipe())
    graph = Graph()
    plain = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
    loaded = graph.add("DMD_LoadLoRA", model=plain, file=file, strength=1.0)
    assert "this LoRA is for SD3, the model is sd1" in refusal(server, graph, loaded).message


def test_stable_diffusion_under_a_flow_models_recipe_is_refused_in_one_line(
    server: Server,
) -> None:
    source = models(server, "checkpoints", put(server, tiny_sd15))
    path = models(server, "diffusion_models", "not_sd3.safetensors")
    ldm_unet(path, source, flow_recipe(), torch.half)
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"diffusion_models/{path.name}")
    assert "the recipe is for SD3, the model is sd1" in refusal(server, graph, loaded).message


def test_an_empty_latent_of_a_flow_model_is_of_its_own_format(server: Server) -> None:
    graph = Graph()
    model = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd3))
    empty = graph.add("DMD_EmptyLatent", model=model, width=0, height=64, batch_size=2)
    (latent,) = sample(server, graph, empty)
    assert latent.shape == (2, 16, 8, 128)
