"""Small text encoders, conditions to the last option, and a NOISE that is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WIDTH = 64


class RandomClip:
    """ComfyUI's own text encoder of a family with random weights: three layers, 64 wide."""

    CATEGORY = "probe"
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"family": (["sd15", "sdxl"],)}}

    def make(self, family: str) -> tuple[Any]:
        import comfy.sd
        from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
        from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer
        from comfy.supported_models_base import ClipTarget

        kinds = {"sd15": (SD1Tokenizer, SD1ClipModel), "sdxl": (SDXLTokenizer, SDXLClipModel)}
        small = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "projection_dim": WIDTH}
        small |= {"num_attention_heads": 4, "num_hidden_layers": 3}
        options = {f"clip_{name}_model_config": small for name in "lg"}
        clip = comfy.sd.CLIP(ClipTarget(*kinds[family]), model_options=options)
        random = torch.Generator().manual_seed(0)
        for weight in clip.cond_stage_model.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=random) / WIDTH**0.5)
        return (clip,)


class SaveConditions:
    """Every entry of a CONDITIONING, in its own precision, to output/NAME.safetensors.

    Entry i's tensor is under "i", those of its options under "i.KEY"; its texts are metadata.
    """

    CATEGORY = "probe"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "name": ("STRING", {"default": "conditions"}),
            }
        }

    def save(self, conditioning: list[Any], name: str) -> dict[str, Any]:
        from folder_paths import get_output_directory

        tensors, texts = {}, {}
        for i, (tensor, options) in enumerate(conditioning):
            tensors[f"{i}"] = tensor.contiguous()
            for key, value in options.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{i}.{key}"] = value.contiguous()
                elif isinstance(value, str):
                    texts[f"{i}.{key}"] = value
        save_file(tensors, Path(get_output_directory(), f"{Path(name).name}.safetensors"), texts)
        return {}


class GivenNoise:
    """A NOISE that is the tensor `noise` of input/NAME.safetensors."""

    CATEGORY = "probe"
    RETURN_TYPES = ("NOISE",)
    FUNCTION = "give"
    seed = 0

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"name": ("STRING", {"default": "noise"})}}

    def give(self, name: str) -> tuple[GivenNoise]:
        from folder_paths import get_input_directory

        given = GivenNoise()
        given.noise = load_file(Path(get_input_directory(), f"{Path(name).name}.safetensors"))  # type: ignore[attr-defined]
        return (given,)

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        noise: torch.Tensor = self.noise["noise"]  # type: ignore[attr-defined]
        return noise


CONDITION_NODES = {
    "Probe_RandomClip": RandomClip,
    "Probe_SaveConditions": SaveConditions,
    "Probe_GivenNoise": GivenNoise,
}
