"""The names of a UNet's weights in a single file (LDM), which ComfyUI and A1111 read."""

from collections.abc import Iterable
from typing import Any

LDM = "model.diffusion_model."
"""What a single file puts before the names of its UNet's weights."""

ENDS = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
RESIDUAL = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
"""Within a residual block: diffusers -> LDM."""


def unet_names(keys: Iterable[str], config: Any) -> dict[str, str]:
    """LDM's names, without the prefix, by diffusers' names of a UNet2DConditionModel's weights.

    Raises KeyError for a layer that LDM has not.

    LDM counts input blocks through (conv_in, then each level's blocks and its downsampler), and
    output blocks likewise, where an upsampler is the last part of a level's last block.
    """
    blocks = ENDS | _blocks(config)
    names = {}
    for key in keys:
        prefix = next((prefix for prefix in blocks if key.startswith(prefix)), None)
        if prefix is None:
            raise KeyError(key)
        rest = key.removeprefix(prefix)
        if ".resnets." in prefix:
            part = next(part for part in RESIDUAL if rest.startswith(part))
            rest = RESIDUAL[part] + rest.removeprefix(part)
        names[key] = blocks[prefix] + rest
    return names


def _blocks(config: Any) -> dict[str, str]:
    levels, depth = len(config.block_out_channels), config.layers_per_block
    prefixes = {}
    for level in range(levels):
        down, up = f"down_blocks.{level}.", f"up_blocks.{level}."
        first_in, first_out = 1 + level * (depth + 1), level * (depth + 1)
        for i in range(depth):
            prefixes[f"{down}resnets.{i}."] = f"input_blocks.{first_in + i}.0."
            prefixes[f"{down}attentions.{i}."] = f"input_blocks.{first_in + i}.1."
        prefixes[f"{down}downsamplers.0.conv."] = f"input_blocks.{first_in + depth}.0.op."
        for i in range(depth + 1):
            prefixes[f"{up}resnets.{i}."] = f"output_blocks.{first_out + i}.0."
            prefixes[f"{up}attentions.{i}."] = f"output_blocks.{first_out + i}.1."
        part = 2 if "CrossAttn" in config.up_block_types[level] else 1
        prefixes[f"{up}upsamplers.0."] = f"output_blocks.{first_out + depth}.{part}."
    return prefixes | {
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
    }
