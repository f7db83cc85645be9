"""Nodes that only the tests load: a condition without a text encoder, exact latents in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def condition(seed: int, width: int) -> torch.Tensor:
    """What Probe_Conditioning gives: (1, 77, width) float32, or for tests to compute beside it."""
    return torch.randn(1, 77, width, generator=torch.Generator().manual_seed(seed))


def pooled_condition(seed: int, width: int) -> torch.Tensor:
    """The pooled text vector beside it: (1, width) float32."""
    return torch.randn(1, width, generator=torch.Generator().manual_seed(seed + 1))


class Conditioning:
    """A condition from a seed: the tiny checkpoints have no text encoder, which does not shrink."""

    CATEGORY = "probe"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31}),
                "width": ("INT", {"default": 768, "min": 1}),  # SD 1.x 768, SD 2.x 1024, SDXL 2048
                "pooled_width": ("INT", {"default": 0, "min": 0}),  # SDXL 1280; 0: none
            }
        }

    def make(self, seed: int, width: int, pooled_width: int) -> tuple[list[Any]]:
        extra = {"pooled_output": pooled_condition(seed, pooled_width)} if pooled_width else {}
        return ([[condition(seed, width), extra]],)


class SaveLatent:
    """Write a latent's samples as float32 to output/NAME.safetensors, under the key `samples`."""

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT",), "name": ("STRING", {"default": "latent"})}}

    def save(self, latent: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
        from folder_paths import get_output_directory

        file = _inside(get_output_directory(), name)
        save_file({"samples": latent["samples"].float().contiguous()}, file)
        return {"ui": {"files": [{"filename": file.name, "subfolder": "", "type": "output"}]}}


class LoadLatent:
    """Read input/NAME.safetensors, as SaveLatent writes it, without ComfyUI's rescaling."""

    CATEGORY = "probe"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {"default": "latent"})}}

    def load(self, name: str) -> tuple[dict[str, torch.Tensor]]:
        from folder_paths import get_input_directory

        return (load_file(_inside(get_input_directory(), name)),)


def _inside(folder: str, name: str) -> Path:
    """A prompt names a file, never a place: this server also answers to a browser."""
    file = Path(folder, f"{name}.safetensors")
    if file.parent != Path(folder):
        raise ValueError(f"{name!r} is not a plain file name")
    return file


NODE_CLASS_MAPPINGS = {
    "Probe_Conditioning": Conditioning,
    "Probe_SaveLatent": SaveLatent,
    "Probe_LoadLatent": LoadLatent,
}
