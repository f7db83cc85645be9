"""The ground the other tests stand on: a stock graph, exact to a formula, in a real ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from kit.checkpoints import as_diffusers_unet, tiny_sd2_eps, tiny_sd2_v, tiny_sd15, tiny_sdxl
from kit.comfy_host import PromptFailed, PromptRefused, Server
from kit.probe_nodes import condition, pooled_condition
from safetensors.torch import load_file

SEED = 7
LAST = 999  # the timestep at which a one-step sample starts


def one_step(checkpoint: str, width: int, pooled_width: int = 0) -> dict[str, Any]:
    """Noise to latent in one stock KSampler step at cfg 1, for 64 x 64 pixels (API form)."""
    return {
        "model": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "condition": {
            "class_type": "Probe_Conditioning",
            "inputs": {"seed": SEED, "width": width, "pooled_width": pooled_width},
        },
        "empty": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        },
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0],
                "positive": ["condition", 0],
                "negative": ["condition", 0],
                "latent_image": ["empty", 0],
                "seed": SEED,
                "steps": 1,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "save": {
            "class_type": "Probe_SaveLatent",
            "inputs": {"latent": ["sample", 0], "name": checkpoint.removesuffix(".safetensors")},
        },
    }


def put(server: Server, make: Callable[[Path], None]) -> str:
    """Build a checkpoint where the server looks for them; its name there."""
    folder = server.base / "models/checkpoints"
    folder.mkdir(exist_ok=True)
    name = f"{make.__name__}.safetensors"
    if not (folder / name).exists():
        make(folder / name)
    return name


@pytest.mark.parametrize(
    ("make", "width", "pooled_width", "prediction", "latent_scale"),
    [
        (tiny_sd15, 768, 0, "epsilon", 0.18215),
        (tiny_sd2_eps, 1024, 0, "epsilon", 0.18215),
        (tiny_sd2_v, 1024, 0, "v_prediction", 0.18215),
        (tiny_sdxl, 2048, 1280, "epsilon", 0.13025),
    ],
)
def test_one_stock_step_is_what_diffusers_lcm_scheduler_makes_of_the_same_weights(
    server: Server,
    make: Callable[[Path], None],
    width: int,
    pooled_width: int,
    prediction: str,
    latent_scale: float,
) -> None:
    checkpoint = put(server, make)
    (file,) = server.output_files(server.run(one_step(checkpoint, width, pooled_width)))
    sampled = load_file(file)["samples"] * latent_scale  # a LATENT is what the VAE takes

    unet = as_diffusers_unet(server.base / "models/checkpoints" / checkpoint)
    scheduler = LCMScheduler(prediction_type=prediction)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))
    added = {
        "text_embeds": pooled_condition(SEED, pooled_width),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    with torch.no_grad():
        output = unet(
            noise,
            LAST,
            condition(SEED, width),
            added_cond_kwargs=added if pooled_width else None,
        ).sample
    scheduler.set_timesteps(1)
    expected = scheduler.step(output, torch.tensor(LAST), noise).denoised
    assert (sampled - expected).norm() < 1e-5 * expected.norm()


def test_a_prompt_that_validation_refuses_names_the_node_and_its_input(server: Server) -> None:
    prompt = one_step("no such file.safetensors", 768)
    with pytest.raises(PromptRefused) as refusal:
        server.run(prompt)
    (error,) = refusal.value.node_errors["model"]["errors"]
    assert error["extra_info"]["input_name"] == "ckpt_name"


def test_a_node_that_raises_fails_the_prompt_with_its_own_words(server: Server) -> None:
    prompt = one_step(put(server, tiny_sd15), 768)
    prompt["save"]["inputs"]["name"] = "../elsewhere"
    with pytest.raises(PromptFailed, match="not a plain file name") as failure:
        server.run(prompt)
    assert failure.value.node_type == "Probe_SaveLatent"
