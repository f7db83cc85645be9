"""LPIPS as the regression's distance (DMD A.7): on decoded pictures, by torchmetrics."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..method.network import Network
from ..method.objectives import Distance

VGG = "vgg16-397923af.pth"
"""torchvision's file of the backbone that the paper's LPIPS has."""

ALTERNATIVE = "or set regression_loss: pseudo-huber, which needs no weights."


def lpips(network: Network) -> Distance:
    """The distance of (samples, targets) in latents: LPIPS once decoded, with its gradient.

    Raises UserError unless torchvision, the backbone's weights and a decoder are on this machine:
    nothing is downloaded.
    """
    if network.latent_scale is None:
        raise UserError(f"regression_loss: lpips is not for {network.family} networks.")
    if importlib.util.find_spec("torchvision") is None:
        raise UserError(f"regression_loss: lpips needs torchvision: install it, {ALTERNATIVE}")
    weights = Path(torch.hub.get_dir()) / "checkpoints" / VGG
    if not weights.is_file():
        raise UserError(
            f"regression_loss: lpips needs {weights}. Download "
            f"https://download.pytorch.org/models/{VGG} to there, {ALTERNATIVE}"
        )
    if network.decoder is None:
        raise UserError(
            "regression_loss: lpips compares pictures, and the teacher has no VAE. Set decoder to "
            f"a TAESD file, {ALTERNATIVE}"
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.to(network.device)
    metric.requires_grad_(False)
    network.decoder.requires_grad_(False)

    def distance(x_ref: Tensor, y_ref: Tensor) -> Tensor:
        with torch.no_grad():
            target = network.decode(y_ref)
        # beyond -1..1 there is no colour; clamping the sample would cut its gradient
        loss: Tensor = metric(network.decode(x_ref), target.clamp(-1, 1)).mean()
        return loss

    return distance
