"""Random weights under the names of the files that the workflows ask people to download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import UNET, as_diffusers_unet, tiny_sd15, tiny_sdxl
from published import kohya, lora_of
from safetensors.torch import load_file, save_file

SDXL, SD15 = "sd_xl_base_1.0.safetensors", "v1-5-pruned-emaonly-fp16.safetensors"
WIDTHS = {SD15: (768, 0), SDXL: (2048, 1280)}
"""Base model -> width of its text condition and of the pooled one."""


def put_files(models: Path) -> None:
    """The two base models, with DMD2's UNets and LoRA for them."""
    checkpoints, unets, loras = (
        models / name for name in ("checkpoints", "diffusion_models", "loras")
    )
    for folder in (checkpoints, unets, loras):
        folder.mkdir(parents=True, exist_ok=True)
    tiny_sdxl(checkpoints / SDXL)
    tiny_sd15(checkpoints / SD15)
    unet_alone(unets / "dmd2_sdxl_1step_unet_fp16.bin", tiny_sdxl)
    unet_alone(unets / "dmd2_sd15_1step_unet.bin", tiny_sd15)
    lora = kohya(lora_of(as_diffusers_unet(checkpoints / SDXL), rank=2), alpha=8.0)
    save_file(lora, loras / "dmd2_sdxl_4step_lora_fp16.safetensors")


def unet_alone(path: Path, make: Callable[[Path, int], None]) -> None:
    """A pickled UNet. Its keys are LDM's: ComfyUI knows diffusers' keys only in full size."""
    whole = path.with_suffix(".part")
    make(whole, 1)
    weights = load_file(whole)
    whole.unlink()
    own = {key.removeprefix(UNET): weights[key] for key in weights if key.startswith(UNET)}
    torch.save(own, path)


def made_small(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same prompt (API form) for the stand-ins: 64 pixels, 4 steps at most, no text encoder."""
    (base,) = (
        node["inputs"]["ckpt_name"]
        for node in prompt.values()
        if node["class_type"] == "CheckpointLoaderSimple"
    )
    width, pooled_width = WIDTHS[base]
    small = {}
    for node_id, node in prompt.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        if kind == "CLIPTextEncode":
            kind = "Probe_Conditioning"
            inputs = {"seed": 1, "width": width, "pooled_width": pooled_width}
        elif kind in ("DMD_OneStepSampler", "EmptyLatentImage"):
            inputs |= {"width": 64, "height": 64}
        elif kind == "KSampler":
            inputs["steps"] = min(inputs["steps"], 4)
        small[node_id] = {"class_type": kind, "inputs": inputs}
    return small
