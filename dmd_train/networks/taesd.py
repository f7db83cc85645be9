"""TAESD, a decoder of a few megabytes, from the file that ComfyUI has in models/vae_approx."""

import os
import re
from pathlib import Path

from diffusers import AutoencoderTiny

from ..errors import UserError
from ..files.read import read_weights
from .sd_layout import fit

DIFFUSERS = "decoder.layers."


def taesd(path: Path) -> AutoencoderTiny:
    """A file with its decoder, under madebyollin's names or diffusers'; or a diffusers folder."""
    if os.path.isdir(path):
        path = path / "diffusion_pytorch_model.safetensors"
    tensors, _ = read_weights(path)
    decoder = {
        key.removeprefix(DIFFUSERS): value
        for key, value in tensors.items()
        if key.startswith(DIFFUSERS)
    }
    if not decoder:
        # there the first layer is a clamp, which diffusers applies outside of its layers
        found = {re.fullmatch(r"([0-9]{1,3})\.(.+)", key): value for key, value in tensors.items()}
        decoder = {f"{int(m[1]) - 1}.{m[2]}": value for m, value in found.items() if m}
    model = AutoencoderTiny()
    try:
        fit(model.decoder.layers, decoder)
    except ValueError:
        raise UserError(
            f"decoder: {path} is no TAESD decoder. Give taesd_decoder.safetensors, or for SDXL "
            "taesdxl_decoder.safetensors; or leave decoder out for the teacher's own VAE."
        ) from None
    del model.encoder
    return model.float().eval().requires_grad_(False)
