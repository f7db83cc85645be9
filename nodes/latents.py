"""The latents of a MODEL: their size, and their colours where there is no VAE."""

import comfy.model_management
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..dmd_train.errors import UserError
from .model_recipe import family_of, native_size


def require_pictures(model: ModelPatcher) -> None:
    """Raises UserError for a MODEL of videos or sounds."""
    if getattr(model.get_model_object("latent_format"), "latent_dimensions", 2) != 2:
        raise UserError(f"model: {family_of(model)} makes no single pictures. Wire an image model.")


def downscale_of(latent_format: LatentFormat) -> int:
    """Pixels a side of a latent's element."""
    ratio: int = getattr(latent_format, "spacial_downscale_ratio", 8)
    return ratio


def empty_latent(model: ModelPatcher, width: int, height: int, batch_size: int) -> Tensor:
    """Zeros, (batch_size, C, H, W) in the MODEL's own latent format; 0 is its native size."""
    latent_format = model.get_model_object("latent_format")
    ratio, native = downscale_of(latent_format), native_size(model)
    size = ((height or native) // ratio, (width or native) // ratio)
    device = comfy.model_management.intermediate_device()
    return torch.zeros((batch_size, latent_format.latent_channels, *size), device=device)


def preview_colours(latent_format: LatentFormat, x0: Tensor) -> Tensor | None:
    """The colours (B, 3, H, W) in [-1, 1] in which ComfyUI previews latents of this format.

    x0: (B, C, h, w) in the MODEL's own scale. None where the format has no colours.
    """
    factors, bias = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    if factors is None:
        return None
    if latent_format.latent_rgb_factors_reshape is not None:
        x0 = latent_format.latent_rgb_factors_reshape(x0)
    colours = torch.einsum("bchw,ck->bkhw", x0.float(), x0.new_tensor(factors).float())
    if bias is not None:
        colours = colours + x0.new_tensor(bias).float()[:, None, None]
    return colours.clamp(-1, 1)
