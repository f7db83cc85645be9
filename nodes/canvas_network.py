"""A MODEL on the canvas, with the LoRAs and merges wired into it, as the engine's Network."""

import copy
from collections.abc import Callable
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, autocast, nn

from ..dmd_train.config import Config
from ..dmd_train.errors import UserError
from ..dmd_train.families import TOLD_PROMPTS
from ..dmd_train.method.network import Condition, Network
from ..dmd_train.method.noise import VP, per_sample
from .conditioning import rows_of
from .fused_gradient import give_gradient
from .latents import (
    as_latent,
    as_pictures,
    decoded,
    downscale_of,
    preview_colours,
    require_pictures,
)
from .model_noise import noise_of
from .model_recipe import family_of, native_size
from .patched_copy import compute_in, is_quantised, patched_copy
from .recomputed_blocks import recompute_blocks
from .wired import Wired

BLOCK_LAYERS = r"(?!.*(mod|adaLN|norm|embed))(.*\.)?\w*(blocks|layers)\.\d+\..*"
"""Layers of a transformer that adapters go on: those of its blocks that mix tokens."""

NEGATIVE = -1
"""The row that stands for the negative condition."""


class CanvasNetwork(Network):
    """A network of ComfyUI's, called as ComfyUI calls it, in the engine's terms.

    Its condition is {"row": (B,) int64 on the CPU}, of the wired conditions; the negative is row
    -1. Samples are in the MODEL's own scale, VP noise with alpha^2 + sigma^2 = 1; ComfyUI's sigma
    is their ratio sigma / alpha.
    """

    file_dtype = torch.float16

    def __init__(self, wired: Wired, config: Config, device: torch.device) -> None:
        give_gradient()
        model = wired.model
        self.noise, self.prediction = noise_of(model)
        self.family, self.half = family_of(model), config.half(device)
        self.license = wired.license
        own = copy.deepcopy(model.get_model_object("model_sampling"))
        self.sigma_data = float(getattr(own, "sigma_data", 0.5))
        self.latent_format = model.get_model_object("latent_format")
        self.downscale = downscale_of(self.latent_format)
        size = (config.resolution or native_size(model)) // self.downscale
        self.shape = (self.latent_format.latent_channels, size, size)
        require_pictures(model)
        self.vae = wired.vae
        if self.vae is not None and self.vae.latent_channels != self.shape[0]:
            raise UserError(
                f"vae: its latents have {self.vae.latent_channels} channels, {self.family}'s have "
                f"{self.shape[0]}. Wire the VAE of the same checkpoint, or none."
            )
        self.rows = wired.rows
        self.negative = rows_of(wired.negative)[0] if wired.negative else None
        self.model_conds: dict[int, dict[str, Any]] = {}

        # full training copies the weights before it halves them
        is_halved = self.half and config.training == "lora"
        dtype = torch.bfloat16 if is_halved else torch.float32
        self.is_quantised = is_quantised(model)
        self.base = copy.copy(model.model)
        self.base._modules = dict(model.model._modules)
        self.base.current_patcher = None
        self.base.model_sampling = own.to(device)
        self.base.latent_format = self.latent_format
        self.base.manual_cast_dtype = dtype if self.is_quantised else None
        self.module = patched_copy(model, device, dtype)
        self.options = model.model_options.get("transformer_options", {})
        self.call = call_of(model)
        known = TOLD_PROMPTS.get(self.family)
        self.names = _diffusers_names(model) if known else {}
        self.middle = _middle(self.module)
        self.lora_targets = known.lora_layers if known else BLOCK_LAYERS
        self.lora_metadata = known.lora_metadata if known else {}

    @torch.no_grad()
    def try_once(self, guidance: float) -> None:
        """Raises UserError if the conditions are not ones that this model understands."""
        x_t = torch.zeros((1, *self.shape), device=self.device)
        t = torch.full((1,), self.noise.last, device=self.device)
        for socket, row in (("conditions", 0), ("negative", NEGATIVE)):
            if row == NEGATIVE and guidance == 1:
                continue
            try:
                mu = self.predict_x0(x_t, t, {"row": torch.tensor([row])})
            except (RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise UserError(
                    f"{socket}: {self.family} cannot read this CONDITIONING "
                    f"({str(error).splitlines()[0][:100]}). Encode prompts with the CLIP that "
                    "belongs to this model."
                ) from error
            if not mu.isfinite().all():
                raise UserError(
                    f"{socket}: with it {self.family} predicts values that are not finite. Try "
                    "another text encoder, or the model in another precision."
                )

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.base.diffusion_model
        return module

    @module.setter
    def module(self, module: nn.Module) -> None:
        base = copy.copy(self.base)
        base._modules = self.base._modules | {"diffusion_model": module}
        self.base = base

    def predict_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
        scale = alpha if isinstance(self.noise, VP) else torch.ones_like(alpha)
        x, ratio = x_t / per_sample(scale), sigma / scale  # float64, as the conversions to x0
        return self._denoised(x, ratio, condition["row"].tolist()).to(x_t.dtype)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        rows = condition["row"]
        if len(rows) == 1 or self._batch(rows.tolist(), x_t.device):
            return super().features(x_t, t, condition)
        each = zip(x_t.split(1), t.split(1), rows.split(1), strict=True)
        return torch.cat([self.features(x_i, t_i, {"row": row}) for x_i, t_i, row in each])

    def _denoised(self, x: Tensor, sigma: Tensor, rows: list[int]) -> Tensor:
        """ComfyUI's own estimate of x0, one by one where the conditions do not fit into a batch."""
        conds = self._batch(rows, x.device)
        if conds is None:
            each = zip(x.split(1), sigma.split(1), rows, strict=True)
            return torch.cat([self._denoised(x_i, sigma_i, [row]) for x_i, sigma_i, row in each])
        options = self.options | {
            "optimized_attention_override": _differentiable_attention,
            "cond_or_uncond": [0] * len(x),
            "sigmas": sigma.float(),
        }
        arguments = {"c": conds | {"transformer_options": options}, "cond_or_uncond": [0] * len(x)}
        with autocast(x.device.type, torch.bfloat16, enabled=self.half):
            given = {"input": as_latent(self.latent_format, x), "timestep": sigma}
            return as_pictures(self.call(self.base.apply_model, arguments | given))

    def _batch(self, rows: list[int], device: torch.device) -> dict[str, Any] | None:
        """What the model makes of these conditions, in one batch; None where they do not join."""
        conds = [self._conds(row) for row in rows]
        first = conds[0]
        if not all(
            other.keys() == first.keys() and all(first[k].can_concat(other[k]) for k in first)
            for other in conds[1:]
        ):
            return None
        return {
            key: _on(first[key].concat([other[key] for other in conds[1:]]), device)
            for key in first
        }

    def _conds(self, row: int) -> dict[str, Any]:
        """One condition through the model's own extra_conds, once."""
        if row not in self.model_conds:
            entry = self.negative if row == NEGATIVE else self.rows[row]
            if entry is None:
                raise UserError(
                    "negative: guidance needs one. Wire DMD Prompts' negative, or set guidance: 1."
                )
            cpu = torch.device("cpu")
            empty = as_latent(self.latent_format, torch.zeros((1, *self.shape)))
            (told,) = comfy.samplers.encode_model_conds(
                self.base.extra_conds,
                comfy.sampler_helpers.convert_cond([entry]),
                empty,
                cpu,
                "negative" if row == NEGATIVE else "positive",
                latent_image=empty.clone(),
            )
            self.model_conds[row] = {
                key: cond.process_cond(batch_size=1, device=cpu, area=None)
                for key, cond in told["model_conds"].items()
            }
        return self.model_conds[row]

    def null_condition(self, condition: Condition) -> Condition:
        return {"row": torch.full_like(condition["row"], NEGATIVE)}

    @torch.no_grad()
    def to_images(self, x0: Tensor) -> Tensor:
        """The VAE's pictures; without one, the latent format's own preview colours."""
        if self.vae is not None:
            with torch.inference_mode():
                latents = as_latent(self.latent_format, x0.float().cpu())
                images = decoded(self.vae, self.latent_format.process_out(latents))
            return images.clone()
        colours = preview_colours(self.latent_format, x0)
        return (x0[:, :3] / 3).clamp(-1, 1) if colours is None else colours

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Raises UserError without a VAE."""
        if self.vae is None:
            raise UserError("images: wire the VAE of this model, to encode them by.")
        with torch.inference_mode():
            colours = images.movedim(1, -1).float().cpu() / 2 + 0.5  # BCHW -> BHWC in [0, 1]
            # one by one: a VAE of videos takes a batch for the frames of one
            latents = torch.cat([self.vae.encode(colour) for colour in colours.split(1)])
            x0 = as_pictures(self.latent_format.process_in(latents.float()))
        return x0.clone().to(images.device)

    def freeze(self) -> None:
        super().freeze()
        if self.half and not self.is_quantised:
            self.module.to(torch.bfloat16)
            compute_in(self.module, torch.bfloat16)

    def checkpoint_gradients(self, checkpoint: Callable[..., Any] | None = None) -> None:
        recompute_blocks(self.module, checkpoint)

    def canonical_name(self, name: str) -> str:
        """The name in diffusers where there is one, as a headless run has it."""
        for ending in ("", ".weight", ".bias"):
            if name.endswith(ending) and (known := self.names.get(name.removesuffix(ending))):
                return known + ending
        return name

    def file_tensors(self) -> dict[str, Tensor]:
        """Weights under their names in a file of the whole diffusion model."""
        weights = self.module.state_dict()
        return dict(self.base.model_config.process_unet_state_dict_for_saving(weights))

    def file_metadata(self) -> dict[str, str]:
        return {}


def _diffusers_names(model: ModelPatcher) -> dict[str, str]:
    """A UNet's layers: ComfyUI's name -> diffusers'."""
    known = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    layer = {ours: theirs for theirs, ours in known.items() if ours.endswith(".weight")}
    return {k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in layer.items()}


Call = Callable[[Callable[..., Tensor], dict[str, Any]], Tensor]
"""What calls a MODEL's network: (network, {"input", "timestep", "c"}) -> its estimate of x0."""


def call_of(model: ModelPatcher) -> Call:
    """What a node has wrapped around the MODEL's network; else the plain call."""

    def plainly(network: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        return network(arguments["input"], arguments["timestep"], **arguments["c"])

    call: Call = model.model_options.get("model_function_wrapper", plainly)
    return call


def _differentiable_attention(_: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Attention as torch computes it: not every fast one has a backward."""
    mixed: Tensor = attention_pytorch(*args, **kwargs)
    return mixed


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_on(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _middle(module: nn.Module) -> str:
    """The name of the layer in its middle: the last of a UNet's bottleneck, else one of its blocks.

    A UNet's blocks are called layer by layer. SSD-1B has no bottleneck: the last way down is.
    """
    if bottleneck := getattr(module, "middle_block", None):
        return f"middle_block.{len(bottleneck) - 1}"
    if down := getattr(module, "input_blocks", None):
        return f"input_blocks.{len(down) - 1}.{len(down[-1]) - 1}"
    lists = [(name, m) for name, m in module.named_children() if isinstance(m, nn.ModuleList)]
    blocks = [f"{name}.{i}" for name, of in lists for i in range(len(of))]
    return blocks[len(blocks) // 2] if blocks else ""
