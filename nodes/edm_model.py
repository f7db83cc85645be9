"""Class-conditional EDM networks as ordinary MODELs, and the VAE of pixels."""

from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher

from ..dmd_train.errors import UserError
from ..dmd_train.method.network import Network
from ..dmd_train.networks.edm import EDMNetwork
from .class_label import LABEL, NO_CLASS


class Pixels(comfy.latent_formats.LatentFormat):
    """Pictures in [-1, 1] as latents of their own size; grey ones have one channel."""

    spacial_downscale_ratio = 1

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels
        self.latent_rgb_factors = torch.eye(3).tolist() if channels == 3 else [[1.0, 1.0, 1.0]]


class RawNetwork(torch.nn.Module):
    """An EDM network under the signature by which ComfyUI calls a diffusion model."""

    def __init__(self, network: EDMNetwork, dtype: torch.dtype, **_: object) -> None:
        super().__init__()
        self.dtype = dtype
        self.shape = network.shape
        self.network = network.module

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None = None, **_: object
    ) -> torch.Tensor:
        """x: c_in x_t, (B, C, H, W); timesteps: c_noise, (B,); y: (B,) class labels."""
        if y is None:
            raise UserError("this model draws classes: wire DMD Class Label, not a text prompt")
        if x.shape[1:] != self.shape:
            height, width = self.shape[1:]
            raise UserError(
                f"this model draws {width} x {height} pixels, nothing else: set width and height "
                "to 0, or wire DMD Empty Latent"
            )
        raw: torch.Tensor = self.network(x, timesteps, y)
        return raw


class EDMConfig(comfy.supported_models_base.BASE):
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    memory_usage_factor = 0.1
    supported_inference_dtypes: ClassVar[list[Any]] = [
        torch.float32
    ]  # fp16 diverges here (DMD2, ImageNet-64)
    vae_key_prefix: ClassVar[list[Any]] = []
    text_encoder_key_prefix: ClassVar[list[Any]] = []

    def __init__(self, network: EDMNetwork) -> None:
        self.latent_format = lambda: Pixels(network.shape[0])
        self.sampling_settings = {
            "sigma_min": network.noise.sigma_min,
            "sigma_max": network.noise.sigma_max,
            "sigma_data": network.sigma_data,
        }
        super().__init__({"network": network})
        self.family, self.native_size = network.family, network.shape[1]

    def inpaint_model(self) -> bool:
        return False

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> None:
        return None


class EDMSampling(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EDM):
    """Sampling starts from sigma_max * N(0, I), not from sqrt(1 + sigma_max^2) * N(0, I)."""

    def noise_scaling(
        self,
        sigma: torch.Tensor,
        noise: torch.Tensor,
        latent: torch.Tensor,
        max_denoise: bool = False,
    ) -> torch.Tensor:
        x_t: torch.Tensor = super().noise_scaling(sigma, noise, latent, max_denoise=False)
        return x_t


class EDMModel(comfy.model_base.BaseModel):
    def __init__(self, config: EDMConfig) -> None:
        super().__init__(config, comfy.model_base.ModelType.EDM, unet_model=RawNetwork)
        self.model_sampling = EDMSampling(config)
        self.classes: int = config.unet_config["network"].classes

    def extra_conds(self, **conditioning: torch.Tensor) -> dict[str, Any]:
        if LABEL not in conditioning:
            return {}
        label = conditioning[LABEL]
        if int(label.max()) >= self.classes:
            raise UserError(
                f"class {int(label.max())}: this model knows the classes 0 to {self.classes - 1}"
            )
        label = torch.where(label == NO_CLASS, self.classes, label)
        return {"y": comfy.conds.CONDRegular(label.to(conditioning["device"]))}


def edm_model(network: Network) -> ModelPatcher:
    """A network of an EDM layout as a MODEL that every stock sampler runs."""
    assert isinstance(network, EDMNetwork)
    config = EDMConfig(network)
    config.set_inference_dtype(torch.float32, None)
    return ModelPatcher(
        EDMModel(config),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


class PixelDecoder(torch.nn.Module):
    """A VAE that changes nothing but the number of channels: grey <-> RGB."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.unused = torch.nn.Parameter(torch.zeros(()))  # ComfyUI asks the dtype of some weight

    def decode(self, samples: torch.Tensor, **_: object) -> torch.Tensor:
        return samples.expand(-1, 3, -1, -1)

    def encode(self, pixels: torch.Tensor, **_: object) -> torch.Tensor:
        return pixels.mean(dim=1, keepdim=True) if self.channels == 1 else pixels


def pixel_vae(channels: int) -> comfy.sd.VAE:
    """ComfyUI's pixel-space VAE, for pictures of one or three channels."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model = PixelDecoder(channels).to(vae.vae_dtype).eval()
    vae.latent_channels = channels
    vae.patcher = ModelPatcher(
        vae.first_stage_model,
        load_device=vae.patcher.load_device,
        offload_device=vae.patcher.offload_device,
    )
    return vae
