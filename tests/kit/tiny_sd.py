"""Stable Diffusion networks of a few thousand weights: every kind of layer, none of the size."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dmd_train.method.network import Condition
from dmd_train.method.noise import Prediction
from dmd_train.networks.stable_diffusion import StableDiffusion

SHAPE = (4, 8, 8)
WIDTH, POOLED = 16, 24

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SDXL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 6 * 8,
    "use_linear_projection": True,
}


def tiny_sd(
    family: str = "sd1", prediction: Prediction = "eps", seed: int = 0, width: int = 16
) -> StableDiffusion:
    """Random weights, the norms' too, so that what is left out shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels = {"block_out_channels": (width, 2 * width)}
        unet = UNet2DConditionModel(**UNET | channels | (SDXL if family == "sdxl" else {}))
        for name, value in unet.named_parameters():
            if value.dim() == 1:
                value.data += 0.1 * torch.randn(value.shape)
            elif name == "conv_out.weight":
                value.data *= 3
    return StableDiffusion(
        unet.eval(),
        family=family,
        prediction=prediction,
        shape=SHAPE,
        license="none",
        empty={"text": torch.linspace(-1, 1, 5 * WIDTH).view(1, 5, WIDTH)},
        decoder=None,
        latent_scale=0.18215,
        downscale=8,
    )


class Texts:
    """Random conditions by number, as `dmd_train.data.conditions.Prompts` gives encoded prompts."""

    def __init__(self, family: str = "sd1", count: int = 6) -> None:
        gen = torch.Generator().manual_seed(1)
        self.text = torch.randn(count, 5, WIDTH, generator=gen)
        self.pooled = torch.randn(count, POOLED, generator=gen) if family == "sdxl" else None

    def rows(self, size: int, gen: torch.Generator) -> Tensor:
        return torch.randint(len(self.text), (size,), generator=gen)

    def balanced(self, size: int) -> Tensor:
        return torch.arange(size) % len(self.text)

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        pooled = {} if self.pooled is None else {"pooled": self.pooled[rows]}
        return {"text": self.text[rows]} | pooled
