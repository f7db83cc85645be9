"""Low-rank adapters by name on one frozen network, and the network seen through one of them.

Gradient checkpointing computes a forward again DURING backward. Each recomputation therefore
switches to the adapter that its forward ran under, whatever is active by then.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from .network import Condition, Network, Wrapped
from .seeding import generator

LISTED_AS = {
    "sd1": {"ss_base_model_version": "sd_v1"},
    "sd2": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0"},
}
"""Family -> the metadata by which A1111 and Forge list a LoRA; any other is for SD 1 to them."""


UNET_LAYERS = (
    r".*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|"
    r"conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)"
)
"""Of a Stable Diffusion UNet, those that adapters go on, by diffusers' names (DMD2 B.5)."""


def kohya_name(layer: str) -> str:
    """The name of a UNet's layer in a LoRA, by which ComfyUI, A1111, Forge and diffusers know it.

    "mid_block.attentions.0.proj_in" -> "lora_unet_mid_block_attentions_0_proj_in".
    """
    return "lora_unet_" + layer.replace(".", "_")


@torch.no_grad()
def merge_lora(module: nn.Module, tensors: dict[str, Tensor], file: str) -> None:
    """Add a LoRA's file to the weights of `module`, in place: W + alpha / rank * up down.

    Raises UserError if a layer of the LoRA is none of the module's.
    """
    layers = {kohya_name(name): layer for name, layer in module.named_modules()}
    for key in sorted({key.partition(".")[0] for key in tensors}):
        down, up = (tensors.get(f"{key}.lora_{way}.weight") for way in ("down", "up"))
        weight = getattr(layers.get(key), "weight", torch.empty(0))
        if down is None or up is None or weight.shape[:2] != (up.shape[0], down.shape[1]):
            raise UserError(f"{file}: its layer {key} is none of the base model's. Another base?")
        alpha = float(tensors.get(f"{key}.alpha", torch.tensor(len(down))))
        delta = up.float().flatten(1) @ down.float().flatten(1)
        weight += (alpha / len(down) * delta).view_as(weight).to(weight)


class Adapters:
    """LoRAs (rank, alpha) on the layers of `network` that its lora_targets names.

    Parameters are float32, whatever the network's. B is zero; A is Kaiming uniform, a function of
    (seed, adapter, layer). Layers go by their canonical names. Raises UserError if no layer fits.
    """

    def __init__(
        self, network: Network, names: tuple[str, ...], rank: int, alpha: float, seed: int
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # seconds, which few commands need
        from peft.tuners.lora import LoraLayer

        self.module, self.canonical_name = network.module, network.canonical_name
        self.rank, self.alpha = rank, alpha
        targets = [
            name
            for name, layer in self.module.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
            and re.fullmatch(network.lora_targets, network.canonical_name(name))
        ]
        if not targets:
            raise UserError(
                f"{network.family}: no layer takes an adapter, so critic and student have no room. "
                "Choose training: full, or load the model in another precision."
            )
        pattern = f"({'|'.join(map(re.escape, targets))})"
        # peft types alpha as an integer, and reads any number
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # it is meant so
            for name in names:
                inject_adapter_in_model(config, self.module, adapter_name=name)
        self.layers: dict[str, Any] = {
            network.canonical_name(name): layer
            for name, layer in self.module.named_modules()
            if isinstance(layer, LoraLayer)
        }
        for adapter in names:
            for name, layer in self.layers.items():
                down, up = layer.lora_A[adapter], layer.lora_B[adapter]
                gen = generator(down.weight.device, seed, "adapter", adapter, name)
                for part in (down, up):
                    part.weight.data = part.weight.data.float()
                nn.init.kaiming_uniform_(down.weight, a=5**0.5, generator=gen)
        self.active: str | None = names[0]
        self.use(None)

    def use(self, name: str | None) -> None:
        """Compute with adapter `name` from now on; None: with the network alone."""
        if name == self.active:
            return
        for layer in self.layers.values():
            # peft's own switches also flip requires_grad, which here belongs to the roles
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        self.active = name

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        before = self.active
        self.use(name)
        try:
            yield
        finally:
            self.use(before)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """One adapter's, trainable: "down_blocks.0...to_q.lora_A.student.weight" and so on."""
        found = {
            f"{layer}.{side}.{name}.weight": getattr(lora, side)[name].weight
            for layer, lora in self.layers.items()
            for side in ("lora_A", "lora_B")
        }
        for parameter in found.values():
            parameter.requires_grad_(True)
        return found

    def file_tensors(self, name: str) -> dict[str, Tensor]:
        """A LoRA's file: down, up and alpha of every layer. The scale is alpha over the rank."""
        tensors = {}
        for layer, lora in self.layers.items():
            key = kohya_name(layer)
            tensors[f"{key}.lora_down.weight"] = lora.lora_A[name].weight
            tensors[f"{key}.lora_up.weight"] = lora.lora_B[name].weight
            tensors[f"{key}.alpha"] = torch.tensor(float(self.alpha))
        return tensors

    @torch.no_grad()
    def merged(self, name: str) -> dict[str, Tensor]:
        """The module's weights with adapter `name` added, under the names of the module alone."""
        merged = {}
        for key, value in self.module.state_dict().items():
            layer, in_base, part = key.rpartition(".base_layer.")
            if ".lora_" in key:
                continue
            if in_base and part == "weight":
                value = value + self.layers[self.canonical_name(layer)].get_delta_weight(name)
            merged[f"{layer}.{part}" if in_base else key] = value
        return merged

    def checkpoint(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """torch's gradient checkpointing, recomputed under the adapter of the forward."""
        name = self.active

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self.using(name)

        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


class Adapted(Wrapped):
    """`network` with one of its adapters; None: without any, the network itself."""

    def __init__(self, network: Network, adapters: Adapters, name: str | None) -> None:
        super().__init__(network)
        self.adapters, self.name = adapters, name

    def predict_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.adapters.use(self.name)
        return super().predict_x0(x_t, t, condition)

    def checkpoint_gradients(self, checkpoint: Callable[..., Any] | None = None) -> None:
        self.network.checkpoint_gradients(checkpoint or self.adapters.checkpoint)

    def file_tensors(self) -> dict[str, Tensor]:
        assert self.name is not None
        return self.adapters.file_tensors(self.name)

    def file_metadata(self) -> dict[str, str]:
        return LISTED_AS.get(self.family, {})
