"""Files laid out as their publishers lay them out, as small as the layout allows."""

from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

Weights = dict[str, Tensor]

CONTEXT = {"sd1": 768, "sd2": 1024, "sdxl": 2048}


@cache
def _unet(family: str, in_channels: int, context: int) -> UNet2DConditionModel:
    pooled: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 128,
    }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=context,
        **(pooled if family == "sdxl" else {}),
    )


def diffusers_unet(family: str, in_channels: int = 4, context: int = 0) -> Weights:
    """A bare UNet2DConditionModel state dict in half precision, as DMD2's own."""
    state = _unet(family, in_channels, context or CONTEXT[family]).state_dict()
    return {key: value.half() for key, value in state.items()}


def kohya_lora(family: str, rank: int = 2) -> Weights:
    """lora_unet_<path with _>.lora_down.weight, .lora_up.weight, .alpha (DMD2's extraction)."""
    lora: Weights = {}
    for key, value in diffusers_unet(family).items():
        if key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "conv1.weight")):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            lora[f"{name}.lora_down.weight"] = torch.zeros(rank, *value.shape[1:])
            ones = (1,) * (value.ndim - 2)
            lora[f"{name}.lora_up.weight"] = torch.zeros(value.shape[0], rank, *ones)
            lora[f"{name}.alpha"] = torch.tensor(8.0)
    return lora


def peft_lora(family: str) -> Weights:
    """<prefix>.<path>.lora_A.weight, as diffusers writes it."""
    return {
        "unet." + key.removesuffix("weight") + f"lora_{side}.weight": torch.zeros(
            *((2, value.shape[1]) if side == "A" else (value.shape[0], 2))
        )
        for key, value in diffusers_unet(family).items()
        if key.endswith(("to_q.weight", "to_k.weight"))
        for side in "AB"
    }


def ldm_unet(family: str) -> Weights:
    """The keys of a CompVis UNet that its readers go by."""
    width = CONTEXT[family]
    state = {
        "time_embed.0.weight": torch.zeros(4, 4),
        "input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, width),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, width),
        "output_blocks.3.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, width),
        "out.2.weight": torch.zeros(4, 4, 3, 3),
    }
    if family == "sdxl":
        state["label_emb.0.0.weight"] = torch.zeros(4, 2816)
    return state


def single_file(family: str, text_encoder: bool, vae: bool) -> Weights:
    """A CompVis or Stability checkpoint."""
    state = {f"model.diffusion_model.{key}": value for key, value in ldm_unet(family).items()}
    state["betas"] = torch.zeros(1000)
    if vae:
        state["first_stage_model.encoder.conv_in.weight"] = torch.zeros(4, 3, 3, 3)
    if text_encoder:
        prefix = "conditioner.embedders.0" if family == "sdxl" else "cond_stage_model"
        state[f"{prefix}.transformer.text_model.final_layer_norm.weight"] = torch.zeros(4)
    return state


def diffusers_vae() -> Weights:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8).state_dict()


def named(*keys: str) -> Weights:
    return {key: torch.zeros(2, 2) for key in keys}


FOREIGN: dict[str, tuple[Weights, str]] = {
    "DMD2 guidance": (
        named("real_unet.conv_in.weight", "fake_unet.conv_in.weight", "cls_pred_branch.0.weight"),
        "guidance network",
    ),
    "DMD2 EDM guidance": (
        named("karras_sigmas", "real_unet.model.enc.64x64_conv.weight", "fake_unet.model.x"),
        "guidance network",
    ),
    "DMD2 LoRA training": (
        named(
            "down_blocks.1.attentions.0.attn2.to_k.base_layer.weight",
            "down_blocks.1.attentions.0.attn2.to_k.lora_A.default.weight",
        ),
        "training state",
    ),
    "SD3": (
        named(
            "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "first_stage_model.x"
        ),
        "SD3",
    ),
    "Flux": (
        named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
        "Flux",
    ),
    "Flux, diffusers": (
        named("single_transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"),
        "Flux",
    ),
    "PixArt": (named("transformer_blocks.0.attn2.to_k.weight", "proj_out.weight"), "transformer"),
    "Wan": (named("blocks.0.cross_attn.k.weight", "head.head.weight"), "transformer"),
    "Flux LoRA": (
        named("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"),
        "a LoRA for another model",
    ),
    "LyCORIS": (named("lora_unet_mid_block_x.hada_w1_a"), "LyCORIS"),
    "ControlNet": (
        named("conv_in.weight", "controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"),
        "ControlNet",
    ),
    "VAE": (diffusers_vae(), "a VAE"),
    "CLIP": (named("text_model.embeddings.position_embedding.weight"), "a text encoder"),
    "T5": (named("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"), "a text enc"),
    "inpainting UNet": (diffusers_unet("sd1", in_channels=9), "inpainting"),
    "SDXL refiner": (diffusers_unet("sdxl", context=1280), "another family"),
    "EDM for CIFAR": (
        named("model.map_layer0.weight", "model.map_label.weight", "model.enc.32x32_conv.weight"),
        "not a layout",
    ),
    "embedding": (named("emb_params"), "not a layout"),
}
"""What is not ours -> (its keys, a part of what the user is told)."""
