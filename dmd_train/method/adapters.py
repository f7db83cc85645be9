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
from .lora import lora_tensors
from .network import Condition, Network, Wrapped
from .seeding import generator


def target_layers(network: Network) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers that adapters go on, by their names in the module."""
    for name, layer in network.module.named_modules():
        fits = re.fullmatch(network.lora_targets, network.canonical_name(name))
        if fits and isinstance(layer, nn.Linear | nn.Conv2d):
            yield name, layer


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
        targets = [name for name, _ in target_layers(network)]
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
        layers = {
            layer: (lora.lora_A[name].weight, lora.lora_B[name].weight)
            for layer, lora in self.layers.items()
        }
        return lora_tensors(layers, self.alpha)

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

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.adapters.use(self.name)
        return super().features(x_t, t, condition)

    def checkpoint_gradients(self, checkpoint: Callable[..., Any] | None = None) -> None:
        self.network.checkpoint_gradients(checkpoint or self.adapters.checkpoint)

    def file_tensors(self) -> dict[str, Tensor]:
        assert self.name is not None
        return self.adapters.file_tensors(self.name)

    def file_metadata(self) -> dict[str, str]:
        return dict(self.network.lora_metadata)
