"""A MODEL's network with weights of its own, everything patched into them."""

import copy
from itertools import chain
from typing import Any

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from .fingerprint import DIFFUSION_MODEL

FULL_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def is_quantised(model: ModelPatcher) -> bool:
    """Whether weights are kept in 8 bits or fewer."""
    return not all(map(_is_full, model.model.diffusion_model.parameters()))


def _is_full(weight: Tensor) -> bool:
    return weight.dtype in FULL_PRECISION and not isinstance(weight, QuantizedTensor)


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
        compute_in(network, dtype)
    return network


def compute_in(network: Any, dtype: torch.dtype) -> None:
    """Sets what ComfyUI casts the network's inputs to."""
    network.dtype = dtype
