"""The latents of a MODEL: their size and axes, and their pictures with a VAE and without.

A LATENT of most models is (B, C, H, W), as the engine has it. Where the format is one of videos,
Qwen-Image's too, it is (B, C, 1, H, W), here and wherever ComfyUI is called.
"""

import comfy.model_management
import torch
from comfy.latent_formats import LatentFormat
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ..dmd_train.errors import UserError
from .model_recipe import family_of, native_size


def require_pictures(model: ModelPatcher) -> None:
    """Raises UserError for a MODEL of sounds or shapes, and for one that sets a picture in motion.

    A model of videos draws pictures too, of one frame.
    """
    is_picture = dimensions_of(model.get_model_object("latent_format")) in (2, 3)
    if not is_picture or _needs_a_picture(model):
        raise UserError(
            f"model: {family_of(model)} makes no single pictures from text. Wire a model that does."
        )


def _needs_a_picture(model: ModelPatcher) -> bool:
    """Whether it reads a picture beside its latent, to set it in motion.

    ComfyUI's flag alone would not do: Wan 2.2 5B has it, and takes a picture or none.
    """
    if not getattr(model.model, "image_to_video", False):
        return False
    latent_format = model.get_model_object("latent_format")
    empty = as_latent(latent_format, torch.zeros(1, latent_format.latent_channels, 8, 8))
    read = model.model.concat_cond(noise=empty, latent_image=empty, device=empty.device)
    return read is not None


def dimensions_of(latent_format: LatentFormat) -> int:
    """2 of pictures, 3 where there is a time axis before height and width, 1 of sounds."""
    dimensions: int = getattr(latent_format, "latent_dimensions", 2)
    return dimensions


def as_latent(latent_format: LatentFormat, x: Tensor) -> Tensor:
    """(B, C, H, W) as this format has it: the same, or one frame, (B, C, 1, H, W)."""
    return x.unsqueeze(2) if dimensions_of(latent_format) == 3 else x


def as_pictures(x: Tensor) -> Tensor:
    """(B, C, H, W) of latents or pixels that may have one frame, (B, C, 1, H, W)."""
    return x.squeeze(2) if x.ndim == 5 else x


def decoded(vae: VAE, latents: Tensor) -> Tensor:
    """A LATENT's samples -> the VAE's pictures, (B, 3, H, W) in [-1, 1]."""
    pixels: Tensor = vae.decode(latents)  # (B, H, W, 3); of a VAE of videos (B, 1, H, W, 3)
    return as_pictures(pixels.movedim(-1, 1)).float() * 2 - 1


def downscale_of(latent_format: LatentFormat) -> int:
    """Pixels a side of a latent's element."""
    ratio: int = getattr(latent_format, "spacial_downscale_ratio", 8)
    return ratio


def empty_latent(model: ModelPatcher, width: int, height: int, batch_size: int) -> Tensor:
    """Zeros in the MODEL's own latent format, as a LATENT has them; 0 is its native size."""
    latent_format = model.get_model_object("latent_format")
    ratio, native = downscale_of(latent_format), native_size(model)
    size = ((height or native) // ratio, (width or native) // ratio)
    device = comfy.model_management.intermediate_device()
    zeros = torch.zeros((batch_size, latent_format.latent_channels, *size), device=device)
    return as_latent(latent_format, zeros)


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
