"""Class-conditional networks, EDM preconditioned: D = c_skip x_t + c_out F(c_in x_t, c_noise)."""

import json

import torch
from torch import Tensor, nn

from ..method.network import NETWORK_KEY, Condition, Network
from ..method.noise import EDM, edm_scalings, per_sample, x0_from
from .described import UNetSettings


class EDMNetwork(Network):
    """Preconditioning around a raw network F(x, c_noise, label) -> like x.

    The condition is {"label": (B,) int64}, 0..classes-1; `classes` itself means "no class".
    """

    prediction = "edm"
    noise: EDM
    classes: int

    def __init__(
        self,
        module: nn.Module,
        *,
        family: str,
        shape: tuple[int, int, int],
        classes: int,
        sigma_data: float,
        license: str,
        middle: str = "",
    ) -> None:
        self.module, self.family, self.shape = module, family, shape
        self.classes, self.sigma_data, self.license = classes, sigma_data, license
        self.middle = middle
        self.noise = EDM()

    def predict_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        sigma = self.noise.sigma(t)
        scalings = edm_scalings(sigma, self.sigma_data)
        x_in = (per_sample(scalings.c_in) * x_t).to(x_t.dtype)
        output = self.module(x_in, scalings.c_noise.to(x_t.dtype), condition["label"])
        return x0_from("edm", output, x_t, self.noise.alpha(t), sigma, self.sigma_data)

    def null_condition(self, condition: Condition) -> Condition:
        return {"label": torch.full_like(condition["label"], self.classes)}

    def file_metadata(self) -> dict[str, str]:
        module_config = getattr(self.module, "config", {})
        description = {
            "family": self.family,
            "shape": self.shape,
            "classes": self.classes,
            "sigma_data": self.sigma_data,
            "license": self.license,
            "config": {k: v for k, v in module_config.items() if k in UNetSettings.model_fields},
        }
        return {NETWORK_KEY: json.dumps(description)}
