"""What users wire around a few-step model: LoRAs, merges, ControlNet, batches, sizes, fp8."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from kit.checkpoints import tiny_sd15, tiny_sdxl
from kit.comfy_host import PromptFailed, Server
from kit.graphs import (
    DIGITS_STUDENT,
    NO_NOISE,
    Graph,
    Node,
    by_diffusers,
    error,
    models,
    noise,
    put,
    sample,
    unet_of,
)
from kit.published import controlnet, kohya, ldm_unet, lora_of, merged, rounded
from safetensors.torch import save_file

from dmd_train.method.recipe import Recipe

EXACT = 1e-4
OFF = 0.01
STUDENT = Recipe(family="sd1", prediction="eps", timesteps=(599,), noise_scale=1.0)


def student(server: Server, graph: Graph) -> Node:
    """Load DMD Checkpoint on a student for t = 599, whose file says so."""
    source = server.base / "models/checkpoints" / put(server, tiny_sd15)
    path = models(server, "diffusion_models", "student.safetensors")
    if not path.exists():
        ldm_unet(path, source, STUDENT, torch.half)
    return graph.add("DMD_LoadCheckpoint", file=f"diffusion_models/{path.name}")


def base_of(server: Server) -> UNet2DConditionModel:
    return unet_of(server.base / "models/checkpoints" / put(server, tiny_sd15))


def test_a_students_recipe_outlives_a_stock_lora_whose_weights_are_merged(server: Server) -> None:
    lora = lora_of(base_of(server), rank=2)
    save_file(kohya(lora, alpha=1.0), models(server, "loras", "style.safetensors"))
    graph = Graph()
    model = graph.add(
        "LoraLoaderModelOnly",
        model=student(server, graph),
        lora_name="style.safetensors",
        strength_model=0.5,
    )
    text, empty = graph.condition("sd15"), graph.empty()
    sockets = graph.model_sampling(model)
    sampled = sample(
        server,
        graph,
        graph.one_step(model, text),
        graph.ksampler(model, text, empty),
        graph.sampler_custom(sockets[0], sockets[1], sockets[2], text, empty),
    )
    with_lora = merged(base_of(server), lora, scale=0.5 / 2)
    expected = by_diffusers(with_lora, "sd15", [599], noise(1, 4, 8, 8), NO_NOISE)
    without = by_diffusers(base_of(server), "sd15", [599], noise(1, 4, 8, 8), NO_NOISE)
    assert error(without, expected) > OFF
    assert max(error(latent, expected) for latent in sampled) <= EXACT


def test_a_students_recipe_outlives_a_stock_merge_with_another_model(server: Server) -> None:
    other_name = put(server, partial(tiny_sd15, seed=1), "another.safetensors")
    graph = Graph()
    other = graph.add("CheckpointLoaderSimple", ckpt_name=other_name)
    model = graph.add("ModelMergeSimple", model1=student(server, graph), model2=other, ratio=0.75)
    text = graph.condition("sd15")
    ours, stock = sample(
        server, graph, graph.one_step(model, text), graph.ksampler(model, text, graph.empty())
    )
    other_state = unet_of(server.base / "models/checkpoints" / other_name).state_dict()
    average = merged(base_of(server), {}, 1.0)
    average.load_state_dict(
        {key: 0.75 * v + 0.25 * other_state[key] for key, v in average.state_dict().items()},
        assign=True,
    )
    expected = by_diffusers(average, "sd15", [599], noise(1, 4, 8, 8), NO_NOISE)
    assert max(error(ours, expected), error(stock, expected)) <= EXACT


def test_what_we_patch_leaves_the_model_of_the_loader_as_it_was(server: Server) -> None:
    def plain_and(more: bool) -> tuple[Graph, Node, Node]:
        graph = Graph()
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
        text = graph.condition("sd15")
        if more:
            model = graph.model_sampling(loaded, "custom timesteps", "399, 199")
            lora = lora_of(base_of(server), rank=2)
            save_file(kohya(lora, alpha=2.0), models(server, "loras", "dmd2_1step.safetensors"))
            model = graph.add(
                "DMD_LoadLoRA", model=model, file="dmd2_1step.safetensors", strength=1.0
            )
            sample(server, graph, graph.one_step(model, text))
        return graph, loaded, text

    graph, loaded, text = plain_and(False)
    (before,) = sample(server, graph, graph.ksampler(loaded, text, graph.empty()))
    plain_and(True)
    graph, loaded, text = plain_and(False)
    # by another node, or the answer would come out of the cache
    sampler = graph.add("KSamplerSelect", sampler_name="lcm")
    sigmas = graph.add("BasicScheduler", model=loaded, scheduler="simple", steps=1, denoise=1.0)
    again = graph.sampler_custom(loaded[0], sampler, sigmas, text, graph.empty())
    (after,) = sample(server, graph, again)
    assert torch.equal(after, before)


def test_a_controlnet_steers_our_sampler_as_it_steers_the_stock_one(server: Server) -> None:
    source = server.base / "models/checkpoints" / put(server, tiny_sd15)
    controlnet(models(server, "controlnet", "tiny.safetensors"), source)
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=source.name)
    control = graph.add("ControlNetLoader", control_net_name="tiny.safetensors")
    hint = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x336699)

    def steered(strength: float) -> Node:
        text = graph.condition("sd15")
        return graph.add(
            "ControlNetApplyAdvanced",
            positive=text,
            negative=text,
            control_net=control,
            image=hint,
            strength=strength,
            start_percent=0.0,
            end_percent=1.0,
        )

    last = graph.model_sampling(loaded, "SD 1.5, 1 step")
    earlier = graph.model_sampling(loaded, "custom timesteps", "399")
    ours, stock, alone, half, full = sample(
        server,
        graph,
        graph.one_step(last, steered(1.0)),
        graph.ksampler(loaded, steered(1.0), graph.empty()),
        graph.one_step(last, graph.condition("sd15")),
        graph.one_step(earlier, steered(0.5)),
        graph.one_step(earlier, steered(1.0)),
    )
    assert error(ours, stock) <= EXACT
    assert error(alone, stock) > OFF
    assert error(half, full) > OFF
    assert torch.isfinite(full).all()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (136, 72), (40, 104)])
def test_each_picture_of_a_batch_of_any_size_is_lcm_schedulers_on_its_own_noise(
    server: Server, width: int, height: int
) -> None:
    """Odd latents, too (17 x 9, 5 x 13). Image i starts from row i of one draw for the batch."""
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{put(server, tiny_sdxl)}")
    model = graph.model_sampling(loaded, "SDXL, 1 step (t = 399)")
    text = graph.condition("sdxl")
    ours, stock = sample(
        server,
        graph,
        graph.one_step(model, text, width, height, 3),
        graph.ksampler(model, text, graph.empty(width, height, 3)),
    )
    start = noise(3, 4, height // 8, width // 8)
    unet = unet_of(server.base / "models/checkpoints/tiny_sdxl.safetensors")
    one_by_one = [by_diffusers(unet, "sdxl", [399], row[None], NO_NOISE) for row in start]
    expected = torch.cat(one_by_one)
    assert max(error(ours, expected), error(stock, expected)) <= EXACT


def test_one_picture_of_a_batch_can_be_drawn_again_alone(server: Server) -> None:
    graph = Graph()
    model = graph.model_sampling(
        graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{put(server, tiny_sd15)}"),
        "SD 1.5, 1 step",
    )
    text, batch = graph.condition("sd15"), graph.empty(batch=3)
    third = graph.add("LatentFromBatch", samples=batch, batch_index=2, length=1)
    all_three, alone = sample(
        server,
        graph,
        graph.one_step(model, text, batch=3),
        graph.one_step(model, text, latent=third),
    )
    assert error(alone, all_three[2:]) <= EXACT


def test_a_picture_in_the_latent_counts_only_where_a_mask_keeps_it(server: Server) -> None:
    save_file({"samples": 5 * noise(1, 4, 8, 8, seed=1)}, server.base / "input/painted.safetensors")
    graph = Graph()
    model = student(server, graph)
    text = graph.condition("sd15")
    painted = graph.add("Probe_LoadLatent", name="painted")
    keep_all = graph.add("SolidMask", value=0.0, width=64, height=64)
    masked = graph.add("SetLatentNoiseMask", samples=painted, mask=keep_all)
    picture, kept, over, plain = sample(
        server,
        graph,
        painted,
        graph.one_step(model, text, latent=masked),
        graph.one_step(model, text, latent=painted),
        graph.one_step(model, text),
    )
    assert torch.equal(over, plain)
    assert error(kept, picture) <= EXACT


def test_fp8_weights_of_the_stock_loader_are_sampled_as_fp8_weights(server: Server) -> None:
    graph = Graph()
    student(server, graph)
    unet = graph.add("UNETLoader", unet_name="student.safetensors", weight_dtype="fp8_e4m3fn")
    model = graph.model_sampling(unet, "custom timesteps", "599")
    text = graph.condition("sd15")
    ours, stock = sample(
        server, graph, graph.one_step(model, text), graph.ksampler(model, text, graph.empty())
    )
    in_fp8 = rounded(base_of(server), torch.float8_e4m3fn)
    expected = by_diffusers(in_fp8, "sd15", [599], noise(1, 4, 8, 8), NO_NOISE)
    assert max(error(ours, expected), error(stock, expected)) <= EXACT


def test_an_interrupted_run_of_several_steps_ends_early_and_the_queue_lives(
    server: Server,
) -> None:
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{put(server, tiny_sd15)}")
    model = graph.model_sampling(loaded, "custom timesteps", "999, 749, 499, 249")
    text = graph.condition("sd15")
    sample(server, graph, graph.one_step(model, text))  # loaded now
    slow = graph.add("Probe_Watch", model=model, name="interrupted", seconds=1.0)
    graph.add("Probe_SaveLatent", latent=graph.one_step(slow, text), name="never")
    queued = server.submit(graph)
    time.sleep(1.5)
    server.interrupt()
    with pytest.raises(PromptFailed) as stopped:
        server.wait(queued)
    assert stopped.value.event == "execution_interrupted"
    following = Graph()
    told = following.add("Probe_Calls", name="interrupted")
    digits = following.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT)
    classes = following.classes("7")
    (drawn,) = sample(server, following, following.one_step(digits, classes, 0, 0))
    assert 1 <= following.shown[told.id]["calls"][0] < 4
    assert torch.isfinite(drawn).all()


def test_a_class_model_says_which_size_it_draws(server: Server) -> None:
    graph = Graph()
    digits = graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT)
    classes = graph.classes("7")
    graph.add(
        "Probe_SaveLatent", latent=graph.ksampler(digits, classes, graph.empty(512, 512)), name="x"
    )
    with pytest.raises(PromptFailed, match="this model draws 8 x 8 pixels"):
        server.run(graph)


def test_width_and_height_0_are_the_size_the_model_was_made_for(server: Server) -> None:
    graph = Graph()
    empties = [
        graph.add("DMD_EmptyLatent", model=model, width=width, height=0, batch_size=2)
        for model, width in (
            (student(server, graph), 0),
            (student(server, graph), 128),
            (graph.add("DMD_LoadCheckpoint", file=f"checkpoints/{put(server, tiny_sdxl)}"), 0),
            (graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT), 0),
        )
    ]
    shapes = [tuple(latent.shape) for latent in sample(server, graph, *empties)]
    assert shapes == [(2, 4, 64, 64), (2, 4, 64, 16), (2, 4, 128, 128), (2, 1, 8, 8)]
