"""A LoRA as files lay it out: down, up and alpha of each layer, W + alpha / rank * up down."""

import re
from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor, nn

from ..errors import UserError

OWN_KEY = re.compile(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)")
"""Every key of a LoRA as it is written here."""

PEFT_KEY = re.compile(
    r"(?:base_model\.model\.|unet\.)*(?P<module>.+)\.lora(?:_(?P<side>[AB])|\.(?P<way>down|up))"
    r"(?:\.\w+)?\.weight"
)
"""A weight of a LoRA as peft and diffusers name it, with or without the adapter's name."""


def kohya_name(layer: str) -> str:
    """The name of a UNet's layer in a LoRA, by which ComfyUI, A1111, Forge and diffusers know it.

    "mid_block.attentions.0.proj_in" -> "lora_unet_mid_block_attentions_0_proj_in".
    """
    return "lora_unet_" + layer.replace(".", "_")


def kohya_key(key: str) -> str:
    """A weight's key by `kohya_name`, whichever of the two namings a file has; others as they are.

    "unet.mid_block.attentions.0.proj_in.lora_A.weight" ->
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight".
    """
    found = PEFT_KEY.fullmatch(key)
    if found is None:
        return key
    way = found["way"] or {"A": "down", "B": "up"}[found["side"]]
    return f"{kohya_name(found['module'])}.lora_{way}.weight"


def lora_tensors(layers: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """The tensors of a file. layers: (down, up) of each."""
    tensors = {}
    for layer, (down, up) in layers.items():
        key = kohya_name(layer)
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return tensors


@torch.no_grad()
def merge_lora(module: nn.Module, tensors: dict[str, Tensor], file: str) -> None:
    """Add a LoRA's file to the weights of `module`, in place; without an alpha, it is the rank.

    Raises UserError if a layer of the LoRA is none of the module's, or its shapes are no LoRA's.
    """
    layers = {kohya_name(name): layer for name, layer in module.named_modules()}
    tensors = {kohya_key(key): value for key, value in tensors.items()}
    for key in sorted({key.partition(".")[0] for key in tensors}):
        down, up = (tensors.get(f"{key}.lora_{way}.weight") for way in ("down", "up"))
        weight = getattr(layers.get(key), "weight", None)
        if weight is None or down is None or up is None:
            raise UserError(f"{file}: its layer {key} is none of the base model's. Another base?")
        alpha = tensors.get(f"{key}.alpha")
        delta = _delta(down, up, alpha)
        if delta is None or weight.ndim < 2 or delta.shape != weight.flatten(1).shape:
            shapes = ", ".join(str(tuple(value.shape)) for value in (down, up, weight))
            raise UserError(
                f"{file}: its layer {key} does not fit the base model's (down, up, base: "
                f"{shapes}). Another base?"
            )
        weight += delta.view_as(weight).to(weight)


def _delta(down: Tensor, up: Tensor, alpha: Tensor | None) -> Tensor | None:
    """alpha / rank * up down, (out, in) float32; None for what are no two matrices of one rank.

    down: (rank, in, ...); up: (out, rank, ...); alpha: a number, None for the rank.
    """
    if down.ndim < 2 or up.ndim < 2 or up.flatten(1).shape[1] != len(down) or not len(down):
        return None
    if not all(value.is_floating_point() for value in (down, up)):
        return None
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex() or not isfinite(alpha)):
        return None
    scale = 1.0 if alpha is None else float(alpha) / len(down)
    return scale * (up.float().flatten(1) @ down.float().flatten(1))
