"""Random weights under the names of the files that the workflows ask people to download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kit.checkpoints import UNET, as_diffusers_unet, tiny_sd15, tiny_sdxl
from kit.flow_model import CONTEXT, tiny_sd3
from kit.published import kohya, lora_of
from safetensors.torch import load_file, save_file

SDXL, SD15 = "sd_xl_base_1.0.safetensors", "v1-5-pruned-emaonly-fp16.safetensors"
SD3 = "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors"
WIDTHS = {SD15: (768, 0), SDXL: (2048, 1280), SD3: CONTEXT["SD3"]}
"""Base model -> width of its text condition and of the pooled one."""

SMALL: dict[str, dict[str, Any]] = {
    "DMD_OneStepSampler": {"width": 64, "height": 64},
    "EmptyLatentImage": {"width": 64, "height": 64},
    "KSampler": {"steps": 4},
    "DMD_TeacherPairs": {"count": 2, "steps": 2, "width": 64, "height": 64},
    "DMD_Distill": {
        "steps": 2,
        "resolution": 64,
        "rank": 4,
        "advanced": "batch_size: 1\ncritic_updates: 1\npairs: 2\npair_steps: 2",
    },
    "DMD_Compare": {"count": 2, "teacher_steps": 2, "width": 64, "height": 64},
}
"""Node -> the widgets that make it quick."""


def put_files(models: Path) -> None:
    """The base models, DMD2's UNets and LoRA for them, and somebody's own LoRAs."""
    checkpoints, unets, loras = (
        models / name for name in ("checkpoints", "diffusion_models", "loras")
    )
    for folder in (checkpoints, unets, loras):
        folder.mkdir(parents=True, exist_ok=True)
    tiny_sdxl(checkpoints / SDXL)
    tiny_sd15(checkpoints / SD15)
    tiny_sd3(checkpoints / SD3)
    unet_alone(unets / "dmd2_sdxl_1step_unet_fp16.bin", tiny_sdxl)
    unet_alone(unets / "dmd2_sd15_1step_unet.bin", tiny_sd15)
    for name, base, seed in [
        ("dmd2_sdxl_4step_lora_fp16", SDXL, 0),
        ("my-style", SD15, 1),
        ("my-character", SD15, 2),
        ("student-lora", SD15, 3),
    ]:
        lora = kohya(lora_of(as_diffusers_unet(checkpoints / base), rank=2, seed=seed), alpha=8.0)
        save_file(lora, loras / f"{name}.safetensors")


def unet_alone(path: Path, make: Callable[[Path, int], None]) -> None:
    """A pickled UNet. Its keys are LDM's: ComfyUI knows diffusers' keys only in full size."""
    whole = path.with_suffix(".part")
    make(whole, 1)
    weights = load_file(whole)
    whole.unlink()
    own = {key.removeprefix(UNET): weights[key] for key in weights if key.startswith(UNET)}
    torch.save(own, path)


def made_small(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same prompt (API form) for the stand-ins: 64 pixels, few steps, random conditions."""
    (base,) = (
        node["inputs"]["ckpt_name"]
        for node in prompt.values()
        if node["class_type"] == "CheckpointLoaderSimple"
    )
    width, pooled_width = WIDTHS[base]

    def random(seed: int) -> dict[str, Any]:
        inputs = {"seed": seed, "width": width, "pooled_width": pooled_width}
        return {"class_type": "Probe_Conditioning", "inputs": inputs}

    small = {"negative": random(2)}
    for node_id, node in prompt.items():
        kind = node["class_type"]
        inputs = node["inputs"] | SMALL.get(kind, {})
        match inputs.get("negative"):
            case [_, 1]:  # the second output of DMD Prompts
                inputs["negative"] = ["negative", 0]
        is_text = kind in ("CLIPTextEncode", "DMD_Prompts")
        small[node_id] = random(1) if is_text else {"class_type": kind, "inputs": inputs}
    return small
