"""Latents to pictures: the scale of each kind of decoder, and TAESD from its file."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from kit.tiny_sd import SHAPE, tiny_sd
from safetensors.torch import save_file
from torch import Tensor

from dmd_train.networks.taesd import taesd

SCALE = 0.18215


def latents() -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4).eval()


def small_taesd() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny().eval()


def test_a_vae_is_given_latents_divided_by_their_scale_and_taesd_as_they_are() -> None:
    for decoder, scale in ((small_vae(), SCALE), (small_taesd(), 1.0)):
        network, x0 = tiny_sd(), latents()
        network.decoder = decoder
        with torch.no_grad():
            expected = decoder.decode(x0 / scale).sample
        torch.testing.assert_close(network.to_images(x0), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_decoded_picture_reaches_the_latent() -> None:
    network, x0 = tiny_sd(), latents().requires_grad_()
    network.decoder = small_vae()
    network.decode(x0).square().mean().backward()
    assert x0.grad is not None
    assert x0.grad.abs().sum() > 0


@pytest.mark.parametrize("names", ["madebyollin", "diffusers"])
def test_taesd_decodes_alike_under_both_names_of_its_weights(names: str, tmp_path: Path) -> None:
    """In madebyollin's own file a clamp, which has no weights, is the first layer."""
    whole = small_taesd()
    weights = whole.decoder.layers.state_dict()
    if names == "diffusers":
        file = {f"decoder.layers.{key}": value for key, value in weights.items()}
    else:
        split = {key: key.partition(".") for key in weights}
        file = {f"{int(split[k][0]) + 1}.{split[k][2]}": value for k, value in weights.items()}
    save_file(file, tmp_path / "taesd_decoder.safetensors")
    loaded = taesd(tmp_path / "taesd_decoder.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded.decode(latents()).sample, whole.decode(latents()).sample)
