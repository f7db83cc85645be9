"""A MODEL on the canvas, with the LoRAs and merges wired into it, as the engine's Network."""

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_sampling as sampling
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, autocast, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ..dmd_train.config import Config
from ..dmd_train.data.conditions import Conditions
from ..dmd_train.errors import UserError
from ..dmd_train.families import TOLD_PROMPTS
from ..dmd_train.method.network import Condition, Network
from ..dmd_train.method.noise import EDM, TIMESTEPS, VP, Flow, Noise, Prediction, per_sample
from .class_label import LABEL
from .conditioning import rows_of
from .edm_model import EDMModel
from .fingerprint import DIFFUSION_MODEL
from .latents import downscale_of, preview_colours, require_pictures
from .model_recipe import family_of, native_size
from .wired import Wired

BLOCK_LAYERS = r"(?!.*(mod|adaLN|norm|embed))(.*\.)?\w*(blocks|layers)\.\d+\..*"
"""Layers of a transformer that adapters go on: those of its blocks that mix tokens."""

NEGATIVE = -1
"""The row that stands for the negative condition."""

NO_TABLE = (sampling.ModelSamplingDiscreteEDM, sampling.StableCascadeSampling)
"""Discrete schedules by name whose timesteps are no indices."""

FULL_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def is_quantised(model: ModelPatcher) -> bool:
    """Whether weights are kept in 8 bits or fewer."""
    return not all(map(_is_full, model.model.diffusion_model.parameters()))


def _is_full(weight: Tensor) -> bool:
    return weight.dtype in FULL_PRECISION and not isinstance(weight, QuantizedTensor)


def noise_of(model: ModelPatcher) -> tuple[Noise, Prediction]:
    """A MODEL's noise over the engine's 1000 timesteps, and what its network predicts.

    Raises UserError for a few-step model and for a kind of noise that is not known here.
    """
    own = model.get_model_object("model_sampling")
    is_unit = getattr(own, "noise_scale", 1.0) == 1  # of 0.33
    is_flow = type(own).calculate_denoised is sampling.CONST.calculate_denoised and is_unit
    if is_flow and isinstance(own, sampling.ModelSamplingDiscreteFlow):
        return Flow(own.shift), "flow"
    if is_flow and isinstance(own, sampling.ModelSamplingFlux):
        return Flow(math.exp(own.shift)), "flow"
    if isinstance(own, sampling.EDM) and isinstance(own, sampling.ModelSamplingContinuousEDM):
        return EDM(float(own.sigma_min), float(own.sigma_max)), "edm"
    is_table = isinstance(own, sampling.ModelSamplingDiscrete) and not isinstance(own, NO_TABLE)
    if is_table and isinstance(own, sampling.EPS) and not isinstance(own, sampling.X0):
        if len(own.sigmas) != TIMESTEPS:
            raise UserError(
                f"model: it has {len(own.sigmas)} timesteps, as few-step models do. Wire the "
                "many-step model that it was made from."
            )
        prediction: Prediction = "v" if isinstance(own, sampling.V_PREDICTION) else "eps"
        return VP(1 / (1 + own.sigmas.double() ** 2)), prediction
    kinds = ", ".join(kind.__name__ for kind in type(own).__mro__[1:3])
    raise UserError(f"model: its noise ({kinds}) is not one that DMD is defined for here.")


@torch.no_grad()
def patched_copy(model: ModelPatcher, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The MODEL's network with weights of its own, on `device`, everything patched into them.

    dtype: of weights in full precision; 8-bit ones stay as they are. The MODEL is not touched.
    """
    if getattr(model, "is_dynamic", bool)():  # weights that are not in memory
        model = model.clone(disable_dynamic=True)
    original: nn.Module = model.model.diffusion_model
    # while a MODEL is loaded, its own weights are where its patches are not
    own_weights = {key: backup.weight for key, backup in model.backup.items()}
    copies: dict[int, Any] = {}
    for name, value in chain(original.named_parameters(), original.named_buffers()):
        key = DIFFUSION_MODEL + name
        weight = own_weights.get(key, value)
        own = dtype if _is_full(weight) else weight.dtype
        if key in model.patches:
            whole = weight.to(device, torch.float32, copy=True)
            _, _, convert = get_key_weight(model.model, key)
            whole = convert(whole, inplace=True) if convert else whole
            weight = comfy.lora.calculate_weight(model.patches[key], whole, key)
        weight = weight.to(device, own, copy=True).detach()
        is_parameter = isinstance(value, nn.Parameter)
        copies[id(value)] = nn.Parameter(weight, requires_grad=False) if is_parameter else weight
    network = copy.deepcopy(original, copies)
    for name, patch in model.object_patches.items():
        if name.startswith(DIFFUSION_MODEL):
            comfy.utils.set_attr(network, name.removeprefix(DIFFUSION_MODEL), copy.deepcopy(patch))
    if getattr(network, "dtype", None) in FULL_PRECISION:
        _compute_in(network, dtype)
    return network


def _compute_in(network: Any, dtype: torch.dtype) -> None:
    """Sets what ComfyUI casts the network's inputs to."""
    network.dtype = dtype


class CanvasNetwork(Network):
    """A network of ComfyUI's, called as ComfyUI calls it, in the engine's terms.

    Its condition is {"row": (B,) int64 on the CPU}, of the wired conditions; the negative is row
    -1. Samples are in the MODEL's own scale, VP noise with alpha^2 + sigma^2 = 1; ComfyUI's sigma
    is their ratio sigma / alpha.
    """

    file_dtype = torch.float16

    def __init__(self, wired: Wired, config: Config, device: torch.device) -> None:
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
            return self.call(self.base.apply_model, arguments | {"input": x, "timestep": sigma})

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
            cpu, shape = torch.device("cpu"), (1, *self.shape)
            (told,) = comfy.samplers.encode_model_conds(
                self.base.extra_conds,
                comfy.sampler_helpers.convert_cond([entry]),
                torch.zeros(shape),
                cpu,
                "negative" if row == NEGATIVE else "positive",
                latent_image=torch.zeros(shape),
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
                latents = self.latent_format.process_out(x0.float().cpu())
                pixels: Tensor = self.vae.decode(latents)
            return pixels.clone().movedim(-1, 1).reshape(len(x0), -1, *pixels.shape[-3:-1]) * 2 - 1
        colours = preview_colours(self.latent_format, x0)
        return (x0[:, :3] / 3).clamp(-1, 1) if colours is None else colours

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Raises UserError without a VAE."""
        if self.vae is None:
            raise UserError("images: wire the VAE of this model, to encode them by.")
        with torch.inference_mode():
            colours = images.movedim(1, -1).float().cpu() / 2 + 0.5  # BCHW -> BHWC in [0, 1]
            latents: Tensor = self.latent_format.process_in(self.vae.encode(colours).float())
        return latents.clone().to(images.device)

    def freeze(self) -> None:
        super().freeze()
        if self.half and not self.is_quantised:
            self.module.to(torch.bfloat16)
            _compute_in(self.module, torch.bfloat16)

    def checkpoint_gradients(self, checkpoint: Callable[..., Any] | None = None) -> None:
        recompute = checkpoint or partial(torch_checkpoint, use_reentrant=False)
        for block in _blocks(self.module):
            if getattr(block.forward, "func", None) is not _recomputed:  # two adapters ask twice
                block.forward = partial(_recomputed, recompute, block.forward)

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


def engine_network(wired: Wired, config: Config) -> tuple[Network, Conditions]:
    """The wired MODEL as a network of its own, and its conditions. Call it in `training_mode`.

    A class-conditional MODEL of this pack's is the engine's own network again, so that a run is
    the headless one bit for bit. Raises UserError for what does not fit together.
    """
    device = comfy.model_management.get_torch_device()
    base = wired.model.model
    if isinstance(base, EDMModel) and "model_sampling" not in wired.model.object_patches:
        edm = copy.copy(base.model_config.unet_config["network"])
        edm.module = patched_copy(wired.model, device, torch.float32).network
        return edm, Labels(_labels(wired, edm.classes), wired.conditions_for(config))
    network = CanvasNetwork(wired, config, device)
    network.try_once(config.guidance)
    return network, Rows(len(wired.rows), wired.conditions_for(config))


def _labels(wired: Wired, classes: int) -> Tensor:
    labels = torch.tensor([int(options.get(LABEL, classes)) for _, options in wired.rows])
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise UserError(
            f"conditions: this model draws the classes 0 to {classes - 1}. Wire DMD Class Label "
            f"with some of them."
        )
    return labels


class Rows(Conditions):
    """The conditions of a CanvasNetwork, by their numbers: uniform."""

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        """Numbers stay on the CPU, where they are looked up."""
        return {"row": rows}


class Labels(Conditions):
    """Some of a network's classes: uniform over the list."""

    def __init__(self, labels: Tensor, name: str) -> None:
        super().__init__(len(labels), name)
        self.labels = labels

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        return {"label": self.labels[rows].to(device)}


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


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of a network, in whose backward their forward is computed again."""
    blocks = []
    for child in module.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            blocks += list(block) if isinstance(block, nn.Sequential) else [block]
    return blocks


def _recomputed(
    checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A block under `checkpoint`, computed both times from what it is given now.

    Blocks add to their input in place, and networks write into their options between blocks.
    """

    def compute(*args: Any, **kwargs: Any) -> Any:
        return forward(*map(_copied, args), **{key: _copied(v) for key, v in kwargs.items()})

    args = tuple(dict(arg) if isinstance(arg, dict) else arg for arg in args)
    kwargs = {key: dict(arg) if isinstance(arg, dict) else arg for key, arg in kwargs.items()}
    return checkpoint(compute, *args, **kwargs)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return value.clone() if isinstance(value, Tensor) else value
