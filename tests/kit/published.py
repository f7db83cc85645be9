"""Files laid out as their publishers lay them out, for a real loader: random weights, true shapes.

ComfyUI reads diffusers' key names through a table of full-sized configurations, so that such a
UNet cannot shrink. A pickle of it can: its tensors are overlapping views of a few small storages.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from kit.checkpoints import UNET, tiny_sd15
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from dmd_train.method.recipe import Recipe

Weights = dict[str, Tensor]

SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD_XS: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # diffusers' old name for the number of heads
}
"""The smallest of SD 1.x in ComfyUI's table, with the heads it gives it: 316 M parameters."""
KOALA: dict[str, Any] = SD_XS | {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 5),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The smallest of SDXL there: 783 M parameters, a third of SDXL base."""
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP = "cond_stage_model.transformer."


def unet(config: dict[str, Any], seed: int = 0) -> UNet2DConditionModel:
    """A network of diffusers' with shared weights, in float32 of half-precision values."""
    with torch.device("meta"):
        network: UNet2DConditionModel = UNet2DConditionModel(**config)
    weights = shared(network.state_dict(), torch.float32, seed)
    network.load_state_dict(weights, assign=True)
    return network.eval()


def shared(like: Weights, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Weights of the shapes of `like` that keep the signal's size, of a few MB together.

    Row i of a matrix starts STEP values after row i - 1, in one storage for each size of numbers.
    """
    step, random = 13, torch.Generator().manual_seed(seed)
    unit = (torch.rand(1 << 20, generator=random) - 0.5) * math.sqrt(12)  # variance 1
    storages: dict[float, Tensor] = {}
    weights = {}
    for i, (key, value) in enumerate(like.items()):
        is_scale = value.ndim == 1 and key.endswith("weight")
        size = math.prod(value.shape[1:]) ** -0.5 if value.ndim > 1 else 0.05
        size = 0.0 if is_scale else 2.0 ** round(math.log2(size))
        if size not in storages:  # 0 stands for the scales of norms
            numbers = unit * size if size else 1 + unit * 0.1
            storages[size] = numbers.half().to(dtype)
        strides = (step, *torch.empty(value.shape, device="meta").stride()[1:])
        strides = strides if value.ndim > 1 else (1,)
        weights[key] = storages[size].as_strided(value.shape, strides, i * 53)
    return weights


def diffusers_file(path: Path, config: dict[str, Any], dtype: torch.dtype = torch.half) -> None:
    """A bare UNet2DConditionModel state dict, as DMD2's root files; of `unet`'s weights."""
    state = shared(unet(config).state_dict(), dtype)
    if path.suffix == ".safetensors":  # which cannot share
        save_file(
            {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}, path
        )
    else:
        torch.save(state, path)


def ldm_unet(path: Path, source: Path, recipe: Recipe | None, dtype: torch.dtype) -> None:
    """The UNet of a tiny checkpoint alone, without prefix; the recipe as a student carries it."""
    state = {
        key.removeprefix(UNET): value.to(dtype)
        for key, value in load_file(source).items()
        if key.startswith(UNET)
    }
    metadata = recipe.to_metadata("a student", (3, 64, 64)) if recipe else {}
    with safe_open(source, "pt") as file:
        save_file(state, path, file.metadata() | metadata)


def with_text_encoder(path: Path) -> None:
    """SD 1.5 as a .ckpt with everything: a tiny UNet, a tiny VAE and CLIP-L in its full size."""
    whole = path.with_name("part.safetensors")
    tiny_sd15(whole)
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(**CLIP_L))
    text = shared(clip.state_dict(), torch.half)
    # transformers 5 dropped the first part of the names that the file has
    named = {f"{CLIP}text_model.{key.removeprefix('text_model.')}": text[key] for key in text}
    torch.save({"state_dict": load_file(whole) | named}, path)
    whole.unlink()


LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
)
"""What DMD2 trains (its extract_lora_module.py)."""


def lora_of(
    network: UNet2DConditionModel, rank: int, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module of `network` -> (down, up), big enough to be seen in a latent."""
    random = torch.Generator().manual_seed(seed)
    lora = {}
    for name, module in network.named_modules():
        if name.endswith(LORA_TARGETS):
            out, *rest = module.weight.shape
            down = torch.randn(rank, *rest, generator=random) / math.prod(rest) ** 0.5
            up = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=random) / 4
            lora[name] = (down, up)
    return lora


def kohya(lora: dict[str, tuple[Tensor, Tensor]], alpha: float) -> Weights:
    """The layout of dmd2_sdxl_4step_lora_fp16.safetensors."""
    state: Weights = {}
    for name, (down, up) in lora.items():
        key = "lora_unet_" + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down.half(), f"{key}.lora_up.weight": up.half()}
        state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def peft(lora: dict[str, tuple[Tensor, Tensor]], prefix: str = "unet.") -> Weights:
    """The layout of diffusers' save_lora_weights."""
    return {
        f"{prefix}{name}.lora_{side}.weight": value.half()
        for name, pair in lora.items()
        for side, value in zip("AB", pair, strict=True)
    }


@torch.no_grad()
def merged(
    network: UNet2DConditionModel, lora: dict[str, tuple[Tensor, Tensor]], scale: float
) -> UNet2DConditionModel:
    """The network with scale * up down added to its weights, from the definition."""
    with torch.device("meta"):
        other: UNet2DConditionModel = UNet2DConditionModel.from_config(network.config)
    state = dict(network.state_dict())
    for name, (down, up) in lora.items():
        d, u = down.half().float(), up.half().float()
        product = (u.flatten(1) @ d.flatten(1)).view(state[f"{name}.weight"].shape)
        state[f"{name}.weight"] = state[f"{name}.weight"] + scale * product
    other.load_state_dict(state, assign=True)
    return other.eval()


def rounded(network: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """The network with every weight rounded to `dtype`, in float32."""
    with torch.device("meta"):
        other: UNet2DConditionModel = UNet2DConditionModel.from_config(network.config)
    state = {key: value.to(dtype).float() for key, value in network.state_dict().items()}
    other.load_state_dict(state, assign=True)
    return other.eval()


def controlnet(path: Path, source: Path) -> None:
    """A ControlNet of a tiny checkpoint: its encoder, and convolutions that are not zero."""
    random = torch.Generator().manual_seed(2)
    state = {
        "control_model." + key.removeprefix(UNET): value
        for key, value in load_file(source).items()
        if key.startswith((f"{UNET}time_embed.", f"{UNET}input_blocks."))
    }
    convolutions = {f"zero_convs.{i}.0": (320, 320, 1) for i in range(2)}
    convolutions["middle_block_out.0"] = (320, 320, 1)
    widths = [3, 16, 16, 32, 32, 96, 96, 256, 320]
    for i, (before, after) in enumerate(pairwise(widths)):
        convolutions[f"input_hint_block.{2 * i}"] = (after, before, 3)
    for key in [key for key in state if ".input_blocks.1.0." in key and "skip" not in key]:
        state[key.replace(".input_blocks.1.0.", ".middle_block.0.")] = state[key].clone()
    for name, (out, rest, size) in convolutions.items():
        weight = torch.randn(out, rest, size, size, generator=random) / (rest * size**2) ** 0.5
        state[f"control_model.{name}.weight"] = weight.half()
        state[f"control_model.{name}.bias"] = torch.zeros(out).half()
    save_file(state, path)
