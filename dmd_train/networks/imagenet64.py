"""EDM's class-conditional ADM network, in the layout of DMD2's ImageNet-64 files.

The publisher's names (`model.enc.32x32_block0.conv0.weight`) onto diffusers' UNet2DModel, with the
configuration read off the shapes. Nothing of ADM is missing there: adaptive scale and shift,
box-filter resampling inside a residual block, 64 channels a head (ADM section 3; EDM appendix F.3).
"""

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import UserError
from ..files.read import Weights
from .edm import EDMNetwork
from .edm_unet import edm_unet

SIGMA_DATA = 0.5
HEAD_CHANNELS = 64
GROUPS = 32
LARGEST = 4096
"""Pixels a side."""

RESIDUAL = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
ENDS = {
    "model.map_layer0": "time_embedding.linear_1",
    "model.map_layer1": "time_embedding.linear_2",
    "model.out_norm": "conv_norm_out",
    "model.out_conv": "conv_out",
}


def imagenet64_network(state: Weights, file: str, license: str) -> EDMNetwork:
    """The network of a generator's state dict, `model.enc.*` and so on, in float32.

    Any size of that layout: resolution, levels, blocks and classes are read off. The result shares
    memory with `state` where it can. Raises UserError, naming `file`, for what does not fit.
    """
    try:
        config = _config(state)
        converted = _convert(state, config)
        with torch.device("meta"):  # 296 M parameters need no random start
            network = edm_unet(
                len(converted["class_embedding.weight"]) - 1, SIGMA_DATA, license, **config
            )
        network.module.load_state_dict(converted, assign=True)
    except KeyError as error:
        raise UserError(
            f"{file}: an EDM network unlike DMD2's ImageNet-64: it has no {error}."
        ) from None
    except Exception as error:  # of another layout, in whatever was being done
        reason = next(reversed(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{file}: an EDM network unlike DMD2's ImageNet-64: {reason}.") from None
    network.module.eval()
    return network


def _config(state: Weights) -> dict[str, Any]:
    """UNet2DModel's arguments. Raises ValueError or KeyError where the layout is another."""
    blocks = [key.split(".")[2] for key in state if key.startswith("model.enc.")]
    sizes = sorted({int(block.split("x")[0]) for block in blocks}, reverse=True)
    if sizes[0] > LARGEST:
        raise ValueError(f"{sizes[0]} pixels a side, more than {LARGEST}")
    channels = [len(state[f"model.enc.{s}x{s}_block0.conv0.weight"]) for s in sizes]
    if min(channels) < 4 * GROUPS:
        raise ValueError(f"{min(channels)} channels, fewer than {4 * GROUPS}: no 32 groups")
    attention = [f"model.enc.{s}x{s}_block0.qkv.weight" in state for s in sizes]
    down = ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attention]
    up = ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attention)]
    return {
        "sample_size": sizes[0],
        "in_channels": state[f"model.enc.{sizes[0]}x{sizes[0]}_conv.weight"].shape[1],
        "out_channels": len(state["model.out_conv.weight"]),
        "block_out_channels": tuple(channels),
        "layers_per_block": len(
            {b for b in blocks if b.startswith(f"{sizes[0]}x{sizes[0]}_block")}
        ),
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": HEAD_CHANNELS,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,  # else the middle's attention has no norm at all
    }


def _convert(state: Weights, config: dict[str, Any]) -> Weights:
    """All weights under diffusers' names. Raises ValueError if one is left over."""
    whole = [key for key, value in state.items() if not value.is_floating_point()]
    if whole:
        raise ValueError(f"its {whole[0]} is stored in whole numbers")
    left = {key: value.float() for key, value in state.items()}
    top = config["sample_size"]
    # one-hot times matrix becomes a row of a table; "no class" was a vector of zeros
    rows = left.pop("model.map_label.weight").T
    converted = {"class_embedding.weight": torch.cat([rows, torch.zeros_like(rows[:1])])}
    for source, target in {**ENDS, f"model.enc.{top}x{top}_conv": "conv_in"}.items():
        for part in ("weight", "bias"):
            converted[f"{target}.{part}"] = left.pop(f"{source}.{part}")
    for source, resnet, attention in _blocks(config):
        converted |= _residual(left, source, resnet)
        if f"{source}.qkv.weight" in left:
            converted |= _attention(left, source, attention)
    if left:
        raise ValueError(f"it also holds {', '.join(list(left)[:3])}")
    return converted


def _blocks(config: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(publisher's block, diffusers' resnet, its attention), over the whole network.

    EDM resamples at the start of a level, diffusers at the end of the one before: the same place.
    """
    levels, depth = len(config["block_out_channels"]), config["layers_per_block"]
    sizes = [config["sample_size"] >> level for level in range(levels)]
    for level, s in enumerate(sizes):
        down, up = f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}"
        if level > 0:
            yield f"model.enc.{s}x{s}_down", f"down_blocks.{level - 1}.downsamplers.0", ""
        for i in range(depth):
            yield f"model.enc.{s}x{s}_block{i}", f"{down}.resnets.{i}", f"{down}.attentions.{i}"
        if level < levels - 1:
            yield f"model.dec.{s}x{s}_up", f"up_blocks.{levels - 2 - level}.upsamplers.0", ""
        for i in range(depth + 1):
            yield f"model.dec.{s}x{s}_block{i}", f"{up}.resnets.{i}", f"{up}.attentions.{i}"
    bottom = f"model.dec.{sizes[-1]}x{sizes[-1]}"
    yield f"{bottom}_in0", "mid_block.resnets.0", "mid_block.attentions.0"
    yield f"{bottom}_in1", "mid_block.resnets.1", ""


def _residual(left: Weights, source: str, target: str) -> Weights:
    """Take one block's residual branch and shortcut out of `left`."""
    converted = {}
    for theirs, ours in RESIDUAL.items():
        box = left.pop(f"{source}.{theirs}.resample_filter", None)
        if box is not None and not (box.shape[-2:] == (2, 2) and bool((box == 0.25).all())):
            raise ValueError(f"{source} resamples by another filter than the 2x2 box")
        if theirs == "skip" and f"{source}.skip.weight" not in left:
            continue  # the same number of channels: the shortcut only resamples, or does nothing
        for part in ("weight", "bias"):
            converted[f"{target}.{ours}.{part}"] = left.pop(f"{source}.{theirs}.{part}")
    return converted


def _attention(left: Weights, source: str, target: str) -> Weights:
    """Take one block's attention out of `left`. Its 1x1 convolutions become matrices.

    Channel 3 c + j of qkv is channel c of q, k, v for j = 0, 1, 2; heads are contiguous in c.
    """
    converted = {}
    for part in ("weight", "bias"):
        converted[f"{target}.group_norm.{part}"] = left.pop(f"{source}.norm2.{part}")
        qkv = left.pop(f"{source}.qkv.{part}")
        for j, name in enumerate(("to_q", "to_k", "to_v")):
            converted[f"{target}.{name}.{part}"] = qkv[j::3].squeeze().contiguous()
        converted[f"{target}.to_out.0.{part}"] = left.pop(f"{source}.proj.{part}").squeeze()
    return converted
