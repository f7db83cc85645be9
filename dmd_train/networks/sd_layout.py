"""The UNets and VAEs of Stable Diffusion, as diffusers networks, from key names and shapes.

A file says nothing about how its network is configured, but diffusers' configuration follows from
what is there: how many blocks, how wide, which with attention. What does not follow is a ValueError
with a short reason: weights that are loaded fit their network exactly.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from diffusers.utils import logging
from torch import Tensor, nn

from ..families import FAMILIES
from ..files.read import Weights
from .ldm_names import LDM

VAE = "first_stage_model."
TAESD = "taesd_"
KEPT = (torch.float16, torch.bfloat16, torch.float32)


def unet(weights: Weights, sample_size: int) -> UNet2DConditionModel:
    """The UNet of all these weights, under LDM's names (with their prefix) or diffusers'."""
    if any(key.startswith(LDM) for key in weights):
        weights = from_ldm(weights)
    config = unet_config(weights) | {"sample_size": sample_size}
    return build(UNet2DConditionModel, config, weights)


def vae(weights: Weights, scaling_factor: float) -> AutoencoderKL | AutoencoderTiny:
    """The VAE of `first_stage_model.*`: Stable Diffusion's own, or TAESD as ComfyUI names it."""
    own = {key.removeprefix(VAE): value for key, value in weights.items()}
    tiny = {key: value for key, value in own.items() if key.startswith(TAESD)}
    if tiny:
        names = {key: _taesd_name(key) for key in tiny}
        return build(AutoencoderTiny, {}, {names[key]: value for key, value in tiny.items()})
    config = vae_config(own) | {"scaling_factor": scaling_factor}
    return build(AutoencoderKL, config, convert_ldm_vae_checkpoint(weights, config))


def build(kind: Any, config: dict[str, Any], weights: Weights) -> Any:
    """A diffusers network in eval mode, in the dtype of its weights, sharing their memory."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a config of another version of diffusers is no concern
    try:
        with torch.device("meta"):  # nothing is drawn at random only to be overwritten
            model = kind.from_config(config)
    finally:
        logging.set_verbosity(verbosity)
    fit(model, weights)
    return model.eval()


def fit(module: nn.Module, weights: Weights) -> None:
    """Give `module`, which may be on the meta device, exactly these weights."""
    own = module.state_dict()
    for key in own.keys() - weights.keys():
        raise ValueError(f"{key} is missing")
    for key in weights.keys() - own.keys():
        raise ValueError(f"{key} has no place")
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise ValueError(f"{key} is {tuple(value.shape)}, not {tuple(own[key].shape)}")
    module.load_state_dict(_one_dtype(weights), assign=True)


def _one_dtype(weights: Weights) -> Weights:
    """Some files mix precisions; a network computes in one."""
    dtypes = {value.dtype for value in weights.values()}
    for dtype in dtypes - {*KEPT, torch.float64}:
        raise ValueError(f"it is stored as {str(dtype).removeprefix('torch.')}, not fp16 or wider")
    if len(dtypes) == 1 and dtypes <= {*KEPT}:
        return weights
    return {key: value.float() for key, value in weights.items()}


def unet_config(weights: Weights) -> dict[str, Any]:
    """UNet2DConditionModel's arguments, from weights under diffusers' names."""
    levels = count(weights, "down_blocks.")
    if levels == 0 or count(weights, "up_blocks.") != levels:
        raise ValueError("it does not go up as often as down")
    channels = [
        len(_get(weights, f"down_blocks.{i}.resnets.0.conv1.weight")) for i in range(levels)
    ]
    layers = [count(weights, f"down_blocks.{i}.resnets.") for i in range(levels)]
    down = [_depths(weights, f"down_blocks.{i}") for i in range(levels)]
    up = [_depths(weights, f"up_blocks.{levels - 1 - i}") for i in range(levels)]
    middle = _depths(weights, "mid_block")

    # a level without attention has no depth: it takes the one that spares the config a list
    bottom: list[list[int]] = [[] for _ in range(levels - 1)] + [middle]
    forward = [_same(d or b or u or [1]) for d, b, u in zip(down, bottom, up, strict=True)]
    backward = [_same(u or d or b or [1]) for d, b, u in zip(down, bottom, up, strict=True)]
    context = {
        value.shape[1] for key, value in weights.items() if key.endswith("attn2.to_k.weight")
    }
    if len(context) != 1:
        raise ValueError("it does not read one text")
    cross_attention_dim = context.pop()
    config = {
        "in_channels": _get(weights, "conv_in.weight").shape[1],
        "out_channels": len(_get(weights, "conv_out.weight")),
        "block_out_channels": tuple(channels),
        "layers_per_block": _same(layers),
        "down_block_types": tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in down),
        "mid_block_type": _middle_type(weights, middle),
        "up_block_types": tuple("CrossAttnUpBlock2D" if u else "UpBlock2D" for u in reversed(up)),
        "transformer_layers_per_block": _same(forward),
        "reverse_transformer_layers_per_block": None if forward == backward else backward[::-1],
        "cross_attention_dim": cross_attention_dim,
        "attention_head_dim": _heads(cross_attention_dim, channels),
        "use_linear_projection": any(
            key.endswith("proj_in.weight") and value.ndim == 2 for key, value in weights.items()
        ),
    }
    if "add_embedding.linear_1.weight" in weights:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": weights["add_embedding.linear_1.weight"].shape[
                1
            ],
        }
    return config


def vae_config(own: Weights) -> dict[str, Any]:
    """AutoencoderKL's arguments, from weights under LDM's names without their prefix."""
    levels = count(own, "encoder.down.")
    channels = [len(_get(own, f"encoder.down.{i}.block.0.conv1.weight")) for i in range(levels)]
    return {
        "latent_channels": _get(own, "post_quant_conv.weight").shape[1],
        "block_out_channels": tuple(channels),
        "layers_per_block": count(own, "encoder.down.0.block."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def count(weights: Weights, prefix: str) -> int:
    """How many different names follow `prefix`."""
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})


def _depths(weights: Weights, block: str) -> list[int]:
    """The number of transformer blocks in each attention of `block`."""
    attentions = count(weights, f"{block}.attentions.")
    return [
        count(weights, f"{block}.attentions.{i}.transformer_blocks.") for i in range(attentions)
    ]


def _same(values: list[Any]) -> Any:
    """The one value of a list in which all are the same, or the list."""
    return values[0] if all(value == values[0] for value in values) else values


def _middle_type(weights: Weights, depths: list[int]) -> str | None:
    if count(weights, "mid_block.") == 0:
        return None
    return "UNetMidBlock2DCrossAttn" if depths else "UNetMidBlock2D"  # SSD-1B: one residual block


def _heads(cross_attention_dim: int, channels: list[int]) -> int | tuple[int, ...]:
    """diffusers' attention_head_dim, which is the number of heads: 64 channels each since SD 2."""
    if cross_attention_dim == FAMILIES["sd1"].text_width:
        return 8
    if any(width % 64 for width in channels):
        raise ValueError(f"its channels {channels} do not make heads of 64")
    return tuple(width // 64 for width in channels)


def from_ldm(weights: Weights) -> Weights:
    """All of `weights` under diffusers' names."""
    down = [i for i in range(1, len(weights)) if f"{LDM}input_blocks.{i}.0.op.weight" in weights]
    # one level has no downsampler that would end it
    layers = down[0] - 1 if down else count(weights, f"{LDM}input_blocks.") - 1
    config: dict[str, Any] = {"layers_per_block": layers}
    if f"{LDM}label_emb.0.0.weight" in weights:
        config["addition_embed_type"] = "text_time"
    converted: Weights = convert_ldm_unet_checkpoint(weights, config)
    lost = len(weights) - len(converted)
    if lost:
        raise ValueError(f"{lost} of its {len(weights)} weights have no place")
    return converted


def _taesd_name(key: str) -> str:
    """ComfyUI's decoder starts with a clamp, which diffusers applies outside of its layers."""
    part, layer, rest = key.removeprefix(TAESD).split(".", 2)
    return f"{part}.layers.{int(layer) - (part == 'decoder')}.{rest}"


def _get(weights: Weights, key: str) -> Tensor:
    if key not in weights:
        raise ValueError(f"{key} is missing")
    return weights[key]
