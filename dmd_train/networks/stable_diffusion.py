"""Stable Diffusion 1.x, 2.x and XL as a Network: latents, text conditions, eps or v."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, autocast
from torch.nn import Module

from ..errors import UserError
from ..families import FAMILIES
from ..method.network import Condition, Network
from ..method.noise import VP, Prediction, x0_from
from .ldm_names import LDM, unet_names
from .sd_file import SDFile, named
from .text import TextEncoder


class StableDiffusion(Network):
    """A UNet on latents (4, H / downscale, W / downscale) of about unit scale.

    The condition is {"text": (B, 77, D)}, for SDXL also {"pooled": (B, 1280)}. empty: the condition
    of the empty prompt, a batch of one, which guidance starts from; SDXL has zeros instead
    (DMD 3.4, DMD2's code). half: compute in bfloat16, with the weights as they are.
    """

    module: UNet2DConditionModel
    decoder: AutoencoderKL | AutoencoderTiny | None
    file_dtype = torch.float16

    def __init__(
        self,
        unet: UNet2DConditionModel,
        *,
        family: str,
        prediction: Prediction,
        shape: tuple[int, int, int],
        license: str,
        empty: Condition,
        half: bool = False,
        decoder: AutoencoderKL | AutoencoderTiny | None,
        latent_scale: float,
        downscale: int,
    ) -> None:
        self.module, self.family, self.prediction = unet, family, prediction
        self.shape, self.license, self.empty, self.half = shape, license, empty, half
        last_down = f"down_blocks.{len(unet.down_blocks) - 1}"
        self.middle = last_down if unet.mid_block is None else "mid_block"  # SSD-1B has none
        # half precision is autocast's: in float16, SDXL's VAE overflows
        self.decoder = Module.float(decoder.requires_grad_(False)) if decoder else None
        self.encoder = self.decoder  # a smaller decoder may take its place, which encodes nothing
        self.latent_scale, self.downscale = latent_scale, downscale
        self.noise = VP.scaled_linear()
        self.lora_targets = FAMILIES[family].lora_layers
        self.lora_metadata = FAMILIES[family].lora_metadata

    def predict_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        added = None
        if "pooled" in condition:
            height, width = (self.downscale * size for size in x_t.shape[2:])
            # original size, crop, target size
            sizes = x_t.new_tensor([height, width, 0, 0, height, width]).expand(len(x_t), -1)
            added = {"text_embeds": condition["pooled"], "time_ids": sizes}
        with autocast(x_t.device.type, torch.bfloat16, enabled=self.half):
            output = self.module(x_t, t, condition["text"], added_cond_kwargs=added).sample
        alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
        return x0_from(self.prediction, output, x_t, alpha, sigma)

    def null_condition(self, condition: Condition) -> Condition:
        if "pooled" in condition:
            return {key: torch.zeros_like(value) for key, value in condition.items()}
        return {"text": self.empty["text"].expand_as(condition["text"])}

    @torch.no_grad()
    def to_images(self, x0: Tensor) -> Tensor:
        """Pictures, one at a time, by the decoder; without one, three channels as colours."""
        if self.decoder is None:
            return (x0[:, :3] / 3).clamp(-1, 1)
        return torch.cat([self.decode(x[None]) for x in x0])

    def decode(self, x0: Tensor) -> Tensor:
        assert self.decoder and self.latent_scale
        self.decoder.to(x0.device)
        # AutoencoderTiny was made for latents of unit scale
        scale = 1.0 if isinstance(self.decoder, AutoencoderTiny) else self.latent_scale
        with autocast(x0.device.type, torch.bfloat16, enabled=self.half):
            images: Tensor = self.decoder.decode(x0 / scale).sample
            return images.float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        if self.encoder is None:
            raise UserError(
                "images: the teacher has no VAE to encode them by. Give one with a VAE."
            )
        self.encoder.to(images.device)
        with autocast(images.device.type, torch.bfloat16, enabled=self.half):
            encoded = self.encoder.encode(images)
        # AutoencoderTiny was made for latents of unit scale
        latents: Tensor = (
            encoded.latents
            if isinstance(self.encoder, AutoencoderTiny)
            else self.latent_scale * encoded.latent_dist.mode()
        )
        return latents.float()

    def freeze(self) -> None:
        super().freeze()
        if self.half:  # as it would be read anyway (DMD2's code)
            Module.to(self.module, torch.bfloat16)

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """diffusers' names -> those of a single file, which ComfyUI reads for any size of UNet."""
        names = unet_names(weights, self.module.config)
        return {LDM + names[key]: value for key, value in weights.items()}

    def load_ldm_tensors(self, tensors: dict[str, Tensor], file: str) -> None:
        """The inverse, into the module, in float32. Raises UserError for those of another UNet."""
        own = self.module.state_dict()
        names = unet_names(own, self.module.config).items()
        weights = {k: tensors[LDM + name].float() for k, name in names if LDM + name in tensors}
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in own.items()}:
            raise UserError(f"{file}: its UNet does not fit the base model. Give its own --base.")
        self.module.load_state_dict(weights)

    def file_metadata(self) -> dict[str, str]:
        return {}


def stable_diffusion(
    file: SDFile,
    text: TextEncoder,
    device: torch.device,
    half: bool,
    resolution: int,
    dtype: torch.dtype = torch.float32,
) -> StableDiffusion:
    """The network of a file. resolution: in pixels; 0: the file's own. dtype: of its weights."""
    size = (resolution or file.native_size) // file.downscale
    with named(file.path, "text encoder"):
        empty = {key: value.to(device) for key, value in text.encode([""]).items()}
    unet, decoder = file.unet(), file.vae()
    _require_alike(file, unet, decoder, empty)
    return StableDiffusion(
        Module.to(unet, dtype=dtype).to(device),
        family=file.family,
        prediction=file.prediction,
        shape=(file.row.latent_channels, size, size),
        license=file.license,
        empty=empty,
        half=half,
        decoder=decoder,
        latent_scale=file.latent_scale,
        downscale=file.downscale,
    )


def _require_alike(
    file: SDFile,
    unet: UNet2DConditionModel,
    decoder: AutoencoderKL | AutoencoderTiny | None,
    empty: Condition,
) -> None:
    """Raises UserError for parts that are not of one model, each whole as it may be."""
    channels, config = file.row.latent_channels, unet.config
    read = {
        "text": (config.cross_attention_dim, empty["text"].shape[-1]),
        "latents": (config.in_channels, config.out_channels),
        "the VAE's latents": (channels, decoder.config.latent_channels if decoder else channels),
    }
    if "pooled" in empty:
        sizes = 6 * (config.addition_time_embed_dim or 0)
        told = empty["pooled"].shape[-1] + sizes
        read["the pooled text"] = (config.projection_class_embeddings_input_dim, told)
    for what, (wanted, given) in read.items():
        if wanted != given:
            raise UserError(
                f"{file.path}: its parts do not fit: the UNet takes {wanted} numbers of {what} and "
                f"is given {given}. Download it again, whole."
            )
