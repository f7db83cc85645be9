"""Random-weight single-file checkpoints, as small as an unpatched ComfyUI still recognises them.

ComfyUI tells the families apart by key layout and a few shapes: 320 model channels, the context
width, whether proj_in is linear, the width of label_emb, and for SDXL the transformer depth of each
input block. Everything else may shrink: no middle block, one channel width, no attention in the
output blocks, TAESD for a VAE, no text encoder. With `clip`, a file also holds the text encoder of
its family, as `clip_layout` has it.

A file is built from a diffusers network, whose configuration travels in its metadata, so that
`as_diffusers_unet` gives back the same weights as the network ComfyUI samples with.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from kit.clip_layout import TOKENS, as_transformers, clip_shapes, position_ids
from safetensors import safe_open
from safetensors.torch import save_file

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CONFIG = "diffusers_unet_config"

ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": [320],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D"],
}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": 5,  # diffusers' old name for the number of heads: 320 / 64
    "use_linear_projection": True,
}


def tiny_sd15(path: Path, seed: int = 0, *, clip: bool = False) -> None:
    """SD 1.5 (eps): 14 M parameters in the UNet."""
    _save(path, seed, ONE_LEVEL | {"cross_attention_dim": 768, "attention_head_dim": 8}, clip)


def tiny_sd2_eps(path: Path, seed: int = 0, *, clip: bool = False) -> None:
    """SD 2.x that ComfyUI takes for an eps model (2.0-base, 2.1-base): 14 M parameters."""
    _save(path, seed, ONE_LEVEL | SD2, clip)


def tiny_sd2_v(path: Path, seed: int = 0, *, clip: bool = False) -> None:
    """SD 2.x that ComfyUI takes for a v model (2.0, 2.1 at 768 px): 80 M parameters.

    Nothing in such a file says v. ComfyUI guesses it from the spread (over 0.09) of one bias in
    output block 11, so the network needs the real file's four levels of three output blocks.
    """
    levels = {
        "block_out_channels": [320] * 4,
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] + ["DownBlock2D"] * 3,
        "mid_block_type": None,
        "up_block_types": ["UpBlock2D"] * 3 + ["CrossAttnUpBlock2D"],
    }
    _save(path, seed, SD2 | levels, clip, bias_spread=0.2)


def tiny_sdxl(path: Path, seed: int = 0, *, clip: bool = False) -> None:
    """SDXL base: 132 M parameters, 79 M of them in the 24 transformer blocks that define it."""
    config = {
        "block_out_channels": [320] * 3,
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": None,
        "up_block_types": ["UpBlock2D"] * 3,
        "cross_attention_dim": 2048,
        "attention_head_dim": 5,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,  # pooled text 1280 + six sizes of 256
    }
    _save(path, seed, config, clip)


def as_diffusers_unet(path: Path) -> UNet2DConditionModel:
    """The UNet of a file made here, in float32: what ComfyUI runs on a CPU."""
    with safe_open(path, "pt") as file:
        unet = _empty_unet(json.loads(file.metadata()[CONFIG]))
        weights = {
            key: file.get_tensor(UNET + ldm).float() for key, ldm in _ldm_names(unet).items()
        }
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def as_transformers_clip(path: Path) -> list[Any]:
    """The text encoders of a file made here with `clip`, in float32."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()[CONFIG])
        weights = {
            key: file.get_tensor(key) for key in list(file.keys()) if not key.startswith(UNET)
        }
    return as_transformers(weights, config["cross_attention_dim"])


def _empty_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
    return unet


def _save(
    path: Path, seed: int, config: dict[str, Any], clip: bool, bias_spread: float = 0.05
) -> None:
    """Weights that keep the signal's size, and biases and norms that show when one is misplaced."""
    unet = _empty_unet({"in_channels": 4, "out_channels": 4, "sample_size": 8} | config)
    with torch.device("meta"):
        vae = AutoencoderTiny()
    shapes = {UNET + ldm: unet.get_parameter(key).shape for key, ldm in _ldm_names(unet).items()}
    shapes |= {VAE + _taesd_name(key): value.shape for key, value in vae.state_dict().items()}
    if clip:
        shapes |= clip_shapes(unet.config.cross_attention_dim)

    random = torch.Generator().manual_seed(seed)
    tensors = {VAE + "vae_scale": torch.tensor(1.0), VAE + "vae_shift": torch.tensor(0.0)}
    for key, shape in shapes.items():
        is_vocabulary = shape[:1] == (TOKENS,)  # a tenth of the time if it repeats itself
        drawn = (TOKENS // 32, *shape[1:]) if is_vocabulary else shape
        noise = (torch.rand(drawn, generator=random) - 0.5) * math.sqrt(12)  # variance 1
        if key.endswith("bias"):
            tensors[key] = noise * bias_spread
        elif len(shape) == 1:  # the scale of a norm
            tensors[key] = 1 + 0.1 * noise
        else:
            tensors[key] = noise / math.sqrt(math.prod(shape[1:]))
        if is_vocabulary:
            tensors[key] = tensors[key].half().repeat(32, 1)
    half = {key: tensor.half() for key, tensor in tensors.items()}
    if clip:
        half |= position_ids(unet.config.cross_attention_dim)
    save_file(half, path, metadata={CONFIG: json.dumps(dict(unet.config), default=list)})


def _taesd_name(key: str) -> str:
    """ComfyUI's decoder starts with a clamp, which diffusers applies outside of its layers."""
    part, layer, rest = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", key).groups()  # type: ignore[union-attr]
    return f"taesd_{part}.{int(layer) + (part == 'decoder')}.{rest}"


def _ldm_names(unet: UNet2DConditionModel) -> dict[str, str]:
    """diffusers key -> the key of the original (LDM) layout, for every weight of `unet`.

    LDM counts input blocks through (conv_in, then each level's blocks and its downsampler), and
    output blocks likewise, where an upsampler is the last part of the level's last block.
    """
    levels, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    prefixes = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }
    for level in range(levels):
        down, up = f"down_blocks.{level}.", f"up_blocks.{level}."
        for layer in range(layers):
            block = f"input_blocks.{1 + level * (layers + 1) + layer}."
            prefixes[f"{down}resnets.{layer}."] = block + "0."
            prefixes[f"{down}attentions.{layer}."] = block + "1."
        prefixes[f"{down}downsamplers.0.conv."] = f"input_blocks.{(level + 1) * (layers + 1)}.0.op."
        for layer in range(layers + 1):
            block = f"output_blocks.{level * (layers + 1) + layer}."
            prefixes[f"{up}resnets.{layer}."] = block + "0."
            prefixes[f"{up}attentions.{layer}."] = block + "1."
        part = 2 if "CrossAttn" in unet.config.up_block_types[level] else 1
        prefixes[f"{up}upsamplers.0."] = f"output_blocks.{level * (layers + 1) + layers}.{part}."
    prefixes |= {
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }

    residual = {
        "norm1.": "in_layers.0.",
        "conv1.": "in_layers.2.",
        "time_emb_proj.": "emb_layers.1.",
        "norm2.": "out_layers.0.",
        "conv2.": "out_layers.3.",
        "conv_shortcut.": "skip_connection.",
    }
    names = {}
    for key in unet.state_dict():
        prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
        rest = key.removeprefix(prefix)
        if ".resnets." in prefix:
            part_name = next(part for part in residual if rest.startswith(part))
            rest = residual[part_name] + rest.removeprefix(part_name)
        names[key] = prefixes[prefix] + rest
    return names
