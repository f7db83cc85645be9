"""Every file that the load nodes list, laid out as its publisher lays it out; and what they refuse.

What comes out is held against diffusers on the same weights. A refusal is one line on the node,
and the next prompt runs.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.checkpoints import tiny_sd15, tiny_sdxl
from kit.comfy_host import PromptFailed, PromptRefused, Server
from kit.graphs import (
    DIGITS_STUDENT,
    NO_NOISE,
    Graph,
    by_diffusers,
    error,
    failed,
    models,
    noise,
    put,
    queue_lives,
    sample,
    told,
    unet_of,
)
from kit.published import (
    KOALA,
    SD15,
    SD_XS,
    diffusers_file,
    kohya,
    ldm_unet,
    lora_of,
    merged,
    peft,
    rounded,
    unet,
    with_text_encoder,
)
from kit.publishers import FOREIGN, diffusers_unet
from safetensors.torch import save_file

from dmd_train.method.recipe import Recipe
from dmd_train.networks.published import DMD2_LICENSE

EXACT = 1e-4
OFF = 0.01
STUDENT = Recipe(
    family="sd1", prediction="eps", timesteps=(599,), noise_scale=1.0, license="CC0", teacher="me"
)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "config", "dtype", "timestep", "says"),
    [
        (
            "sdv1.5_fid8.35_checkpoint_model_041000/pytorch_model.bin",
            *("sd15", SD15, torch.float32, 999),
            f"SD 1.x, diffusers UNet: 1 step at t = 999; licence {DMD2_LICENSE}",
        ),
        (
            "dmd2_sdxl_1step_unet_fp16.bin",
            *("sdxl", KOALA, torch.half, 399),
            f"SDXL, diffusers UNet: 1 step at t = 399; licence {DMD2_LICENSE}",
        ),
        (
            "dmd2_sd15_1step.safetensors",
            *("sd15", SD_XS, torch.half, 999),
            f"SD 1.x, diffusers UNet: 1 step at t = 999; licence {DMD2_LICENSE}",
        ),
    ],
)
def test_a_unet_in_diffusers_keys_is_sampled_as_its_publisher_samples_it(
    server: Server,
    name: str,
    family: str,
    config: dict[str, Any],
    dtype: torch.dtype,
    timestep: int,
    says: str,
) -> None:
    path = models(server, "diffusion_models", name)
    diffusers_file(path, config, dtype)
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"diffusion_models/{name}")
    (sampled,) = sample(server, graph, graph.one_step(loaded, graph.condition(family)))
    assert told(graph, loaded) == says
    path.unlink()
    server.post("/free", {"unload_models": True, "free_memory": True})  # gigabytes
    expected = by_diffusers(unet(config), family, [timestep], noise(1, 4, 8, 8), NO_NOISE)
    assert error(sampled, expected) <= EXACT


def test_four_and_one_step_unets_differ_by_their_names_alone(server: Server) -> None:
    """Same keys, same shapes: the recipe is on the node's line before anything is sampled."""
    lines = []
    for steps in ("1step", "4step"):
        path = models(server, "diffusion_models", f"dmd2_sdxl_{steps}_unet_fp16.bin")
        diffusers_file(path, KOALA)
        graph = Graph()
        loaded = graph.add("DMD_LoadCheckpoint", file=f"diffusion_models/{path.name}")
        sockets = graph.model_sampling(loaded)
        graph.add("Probe_Sigmas", sigmas=sockets[2])
        sample(server, graph)
        lines.append(told(graph, loaded))
        path.unlink()
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert "1 step at t = 399;" in lines[0]
    assert "4 steps at t = 999, 749, 499, 249;" in lines[1]


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_a_student_is_sampled_by_the_recipe_in_its_file(server: Server, dtype: torch.dtype) -> None:
    source = server.base / "models/checkpoints" / put(server, tiny_sd15)
    name = f"mine-{dtype}.safetensors"
    ldm_unet(models(server, "diffusion_models", name), source, STUDENT, dtype)
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"diffusion_models/{name}")
    text = graph.condition("sd15")
    ours, stock = sample(
        server, graph, graph.one_step(loaded, text), graph.ksampler(loaded, text, graph.empty())
    )
    assert told(graph, loaded) == "SD 1.x, LDM UNet: 1 step at t = 599; licence CC0"
    in_file = rounded(unet_of(source), dtype)
    expected = by_diffusers(in_file, "sd15", [599], noise(1, 4, 8, 8), NO_NOISE)
    assert max(error(ours, expected), error(stock, expected)) <= EXACT


def test_a_single_file_gives_its_vae_and_stops_whoever_wants_its_missing_text_encoder(
    server: Server,
) -> None:
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{put(server, tiny_sd15)}")
    model = graph.model_sampling(loaded, "SD 1.5, 1 step")
    latent = graph.one_step(model, graph.condition("sd15"))
    image = graph.add("VAEDecode", samples=latent, vae=loaded[2])
    picture = graph.add("SaveImage", images=image, filename_prefix="decoded")
    text = graph.add("CLIPTextEncode", clip=loaded[1], text="a cat")
    blocked = graph.add("Probe_SaveLatent", latent=graph.one_step(model, text), name="blocked")
    sample(server, graph)
    assert told(graph, loaded) == (
        "SD 1.x, LDM single file with VAE: which recipe? pick one in DMD Model Sampling; "
        "licence unknown"
    )
    assert picture.id in graph.shown
    assert blocked.id not in graph.shown


def test_a_ckpt_with_everything_draws_from_a_prompt(server: Server) -> None:
    put(server, with_text_encoder, "whole.ckpt")
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file="checkpoints/whole.ckpt")
    model = graph.model_sampling(loaded, "SD 1.5, 1 step")
    cat, dog = (graph.add("CLIPTextEncode", clip=loaded[1], text=word) for word in ("cat", "dog"))
    drawn = [graph.one_step(model, text) for text in (cat, dog)]
    image = graph.add("VAEDecode", samples=drawn[0], vae=loaded[2])
    graph.add("SaveImage", images=image, filename_prefix="whole")
    a_cat, a_dog = sample(server, graph, *drawn)
    assert "single file with CLIP and VAE" in told(graph, loaded)
    assert torch.isfinite(a_cat).all()
    assert error(a_dog, a_cat) > 1e-3


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dmd2s_lora_equals_its_weights_merged_by_hand_and_brings_its_recipe(
    server: Server, strength: float
) -> None:
    rank, alpha = 4, 0.5
    base = unet_of(server.base / "models/checkpoints" / put(server, tiny_sdxl))
    lora = lora_of(base, rank)
    save_file(kohya(lora, alpha), models(server, "loras", "dmd2_sdxl_4step_lora_fp16.safetensors"))
    graph = Graph()
    plain = graph.add("DMD_LoadCheckpoint", file="checkpoints/tiny_sdxl.safetensors")
    loaded = graph.add(
        "DMD_LoadLoRA",
        model=plain,
        file="dmd2_sdxl_4step_lora_fp16.safetensors",
        strength=strength,
    )
    text, empty = graph.condition("sdxl"), graph.empty()
    between, ours, stock = sample(
        server,
        graph,
        graph.step_noise(empty, 3),
        graph.one_step(loaded, text),
        graph.ksampler(loaded, text, empty, steps=4),
    )
    assert told(graph, loaded) == (
        f"SDXL, kohya LoRA: 4 steps at t = 999, 749, 499, 249; licence {DMD2_LICENSE}"
    )
    steps = [999, 749, 499, 249]
    with_lora = merged(base, lora, strength * alpha / rank)
    expected = by_diffusers(with_lora, "sdxl", steps, noise(1, 4, 8, 8), between)
    without = by_diffusers(base, "sdxl", steps, noise(1, 4, 8, 8), between)
    assert error(without, expected) > OFF
    assert max(error(ours, expected), error(stock, expected)) <= EXACT


@pytest.mark.parametrize("prefix", ["unet.", "", "base_model.model."])
def test_a_peft_lora_equals_its_weights_merged_by_hand(server: Server, prefix: str) -> None:
    base = unet_of(server.base / "models/checkpoints" / put(server, tiny_sd15))
    lora = lora_of(base, 2)
    name = f"peft-{prefix}1step.safetensors"
    save_file(peft(lora, prefix), models(server, "loras", name))
    graph = Graph()
    plain = graph.add("DMD_LoadCheckpoint", file="checkpoints/tiny_sd15.safetensors")
    model = graph.model_sampling(plain, "SD 1.5, 1 step")
    loaded = graph.add("DMD_LoadLoRA", model=model, file=name, strength=0.25)
    (sampled,) = sample(server, graph, graph.one_step(loaded, graph.condition("sd15")))
    expected = by_diffusers(merged(base, lora, 0.25), "sd15", [999], noise(1, 4, 8, 8), NO_NOISE)
    assert error(sampled, expected) <= EXACT


# --- what is refused ------------------------------------------------------------------------------


def refusal(server: Server, graph: Graph) -> PromptFailed:
    """Why the prompt failed; the prompt after it runs."""
    failure = failed(server, graph)
    queue_lives(server)
    return failure


class Bomb:
    """A pickle of this makes the folder `path` when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def pickle_with_code(path: Path) -> None:
    torch.save({"conv_in.weight": torch.zeros(1), "x": Bomb(path.with_name("gone-off"))}, path)


def old_pickle_with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(path.with_name("gone-off")), protocol=2))


def cut(path: Path) -> None:
    whole = path.with_name("whole" + path.suffix)
    if path.suffix == ".safetensors":
        tiny_sd15(whole)
    else:
        torch.save(diffusers_unet("sd1"), whole)
    path.write_bytes(whole.read_bytes()[:-1000])
    whole.unlink()


def weights(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file(state, path)


BAD_CHECKPOINTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("code_1step.bin", pickle_with_code, "holds code or objects beside tensors"),
    ("old_code.ckpt", old_pickle_with_code, "holds code or objects beside tensors"),
    ("cut.safetensors", cut, "not a whole safetensors file"),
    ("cut.bin", cut, "not a whole PyTorch file"),
    ("nothing.safetensors", Path.touch, "not a whole safetensors file"),
    ("nothing.bin", Path.touch, "empty, it holds no weights"),
    ("hollow.safetensors", partial(weights, {}), "empty, it holds no weights"),
    ("sd3.safetensors", partial(weights, FOREIGN["SD3"][0]), "an SD3 model"),
    (
        "lora.safetensors",
        partial(weights, {"lora_unet_x_attn2_to_k.lora_down.weight": torch.zeros(2, 768)}),
        "a LoRA, not a checkpoint",
    ),
    # recognised, but of no configuration that ComfyUI has
    ("narrow.safetensors", partial(weights, diffusers_unet("sd1")), "Could not detect model type"),
]


@pytest.mark.parametrize(
    ("name", "make", "says"), BAD_CHECKPOINTS, ids=[name for name, *_ in BAD_CHECKPOINTS]
)
def test_a_bad_checkpoint_is_refused_in_one_line_on_its_node_and_the_queue_lives(
    server: Server, name: str, make: Callable[[Path], object], says: str
) -> None:
    path = models(server, "checkpoints", name)
    make(path)
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{name}")
    graph.add("Probe_SaveLatent", latent=graph.one_step(loaded, graph.condition("sd15")), name="x")
    failure = refusal(server, graph)
    assert failure.node_type == "DMD_LoadCheckpoint"
    assert name in failure.message
    assert says in failure.message
    assert not path.with_name("gone-off").exists()


def test_the_code_in_our_bad_pickles_would_have_run(tmp_path: Path) -> None:
    for make in (pickle_with_code, old_pickle_with_code):
        make(tmp_path / "file")
        try:
            torch.load(tmp_path / "file", weights_only=False)
        except Exception:  # a pickle that is no checkpoint is also read, and then refused
            assert make is old_pickle_with_code
        (tmp_path / "gone-off").rmdir()


@pytest.mark.parametrize(
    ("name", "state", "says"),
    [
        ("a_checkpoint.safetensors", diffusers_unet("sdxl"), "a checkpoint, not a LoRA"),
        ("flux.safetensors", FOREIGN["Flux LoRA"][0], "a LoRA for another model"),
        (
            "for_sdxl.safetensors",
            {"lora_unet_x_attn2_to_k.lora_down.weight": torch.zeros(2, 2048)},
            "this LoRA is for sdxl, the model is sd1",
        ),
        (
            "of_other_layers.safetensors",
            {
                "lora_unet_x_attn2_to_k.lora_down.weight": torch.zeros(2, 768),
                "lora_unet_x_attn2_to_k.lora_up.weight": torch.zeros(2, 2),
            },
            "fits no layer of the model",
        ),
    ],
)
def test_a_bad_lora_is_refused_in_one_line_on_its_node_and_the_queue_lives(
    server: Server, name: str, state: dict[str, torch.Tensor], says: str
) -> None:
    weights(state, models(server, "loras", name))
    graph = Graph()
    plain = graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{put(server, tiny_sd15)}")
    model = graph.add("DMD_LoadLoRA", model=plain, file=name, strength=1.0)
    graph.add("Probe_SaveLatent", latent=graph.one_step(model, graph.condition("sd15")), name="x")
    failure = refusal(server, graph)
    assert failure.node_type == "DMD_LoadLoRA"
    assert name in failure.message
    assert says in failure.message


@pytest.mark.parametrize("name", ["checkpoints/../secret.safetensors", "../secret.safetensors"])
def test_no_name_leads_out_of_the_model_folders(server: Server, name: str) -> None:
    """Not in a prompt of one's own, and not through a node that gives any name."""
    shutil.copy(
        models(server, "checkpoints", put(server, tiny_sd15)),
        server.base / "models/secret.safetensors",
    )
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=name)
    graph.add("Probe_Sigmas", sigmas=graph.model_sampling(loaded, "SD 1.5, 1 step")[2])
    with pytest.raises((PromptRefused, PromptFailed)):  # 0.3.75 does not look into such a list
        server.run(graph)
    graph[loaded.id]["inputs"]["file"] = graph.add("Probe_Any", text=name)[0]
    failure = refusal(server, graph)
    assert failure.node_type == "DMD_LoadCheckpoint"
    assert "no such file" in failure.message


NUMBERS = "is no list of falling numbers from 999 to 0"
BAD_RECIPES = [
    ("SD 1.5, 1 step", "", "the recipe is for sd1, the model is sdxl"),
    ("from the file", "", "does not say in how many steps it samples"),
    ("SDXL, 9 steps", "", "SDXL, 9 steps"),
    *(("custom timesteps", bad, NUMBERS) for bad in ("", "soon", "1000", "-1", "249, 999", "9, 9")),
]


@pytest.mark.parametrize(("recipe", "timesteps", "says"), BAD_RECIPES)
def test_a_recipe_that_does_not_fit_is_refused_in_one_line_on_its_node_and_the_queue_lives(
    server: Server, recipe: str, timesteps: str, says: str
) -> None:
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{put(server, tiny_sdxl)}")
    graph.add("Probe_Sigmas", sigmas=graph.model_sampling(loaded, recipe, timesteps)[2])
    try:
        failure = refusal(server, graph)
    except PromptRefused as refused:  # newer ComfyUIs look into the list themselves
        assert recipe in str(refused)
    else:
        assert failure.node_type == "DMD_ModelSampling"
        assert says in failure.message


@pytest.mark.parametrize("recipe", ["custom timesteps", "SD 1.5, 1 step"])
def test_a_class_model_and_a_flow_model_refuse_timesteps(server: Server, recipe: str) -> None:
    sd3 = {
        "joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(192, 64),
        "x_embedder.proj.weight": torch.zeros(64, 16, 2, 2),
        "final_layer.linear.weight": torch.zeros(64, 64),
        "context_embedder.weight": torch.zeros(64, 4096),
        "y_embedder.mlp.0.weight": torch.zeros(64, 2048),
        "pos_embed": torch.zeros(1, 64, 64),
    }
    weights(sd3, models(server, "diffusion_models", "sd3_medium.safetensors"))
    for loader, inputs, says in (
        ("DMD_LoadCheckpoint", {"file": DIGITS_STUDENT}, "choose 'from the file'"),
        ("UNETLoader", {"unet_name": "sd3_medium.safetensors", "weight_dtype": "default"}, "SD3"),
    ):
        graph = Graph()
        model = graph.add(loader, **inputs)
        graph.add("Probe_Sigmas", sigmas=graph.model_sampling(model, recipe, "999")[2])
        failure = refusal(server, graph)
        assert failure.node_type == "DMD_ModelSampling"
        assert says in failure.message


def test_our_sampler_asks_for_a_recipe_where_the_model_has_none(server: Server) -> None:
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{put(server, tiny_sd15)}")
    graph.add("Probe_SaveLatent", latent=graph.one_step(loaded, graph.condition("sd15")), name="x")
    failure = refusal(server, graph)
    assert failure.node_type == "DMD_OneStepSampler"
    assert "put DMD Model Sampling before it" in failure.message


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("10", "class 10: this model knows the classes 0 to 9"),
        ("5-12", "class 12: this model knows the classes 0 to 9"),
        ("cat", "'cat' is no class"),
        ("-3", "'-3' is no class"),
    ],
)
def test_a_class_that_the_model_does_not_draw_is_refused_and_the_queue_lives(
    server: Server, labels: str, says: str
) -> None:
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT)
    latent = graph.one_step(model, graph.add("DMD_ClassLabel", labels=labels), 0, 0)
    graph.add("Probe_SaveLatent", latent=latent, name="x")
    assert says in refusal(server, graph).message


def test_a_prompt_for_a_model_that_draws_classes_is_told_so(server: Server) -> None:
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT)
    latent = graph.one_step(model, graph.condition("sd15"), 0, 0)
    graph.add("Probe_SaveLatent", latent=latent, name="x")
    assert "wire DMD Class Label, not a text prompt" in refusal(server, graph).message
