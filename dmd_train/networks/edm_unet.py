"""diffusers' UNet2DModel as a class-conditional EDM network."""

from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from .edm import EDMNetwork

FAMILY = "edm-unet"


class EDMUNet(UNet2DModel):
    """diffusers' UNet2DModel as a raw EDM network; its last class embedding is "no class"."""

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """F, like x: (B, C, H, W); c_noise: (B,); label: (B,) int64."""
        f: Tensor = super().forward(x, c_noise, class_labels=label, return_dict=False)[0]
        return f


def edm_unet(
    classes: int, sigma_data: float = 0.5, license: str = "unknown", **config: Any
) -> EDMNetwork:
    """An untrained class-conditional UNet. `config` goes to UNet2DModel (block_out_channels...)."""
    unet = EDMUNet(**{**config, "num_class_embeds": classes + 1})
    size = unet.config["sample_size"]
    return EDMNetwork(
        unet,
        family=FAMILY,
        shape=(unet.config["in_channels"], size, size),
        classes=classes,
        sigma_data=sigma_data,
        license=license,
        middle="mid_block",
    )
