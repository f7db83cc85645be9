"""What the engine needs of a diffusion model: its posterior mean, its noise, its parameters."""

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import UserError
from .noise import Noise, Prediction, denoising_weight
from .processes import is_spread

NETWORK_KEY = "dmd.network"
"""The safetensors metadata key under which a file describes its network, as JSON."""

Condition = dict[str, Tensor]
"""What the model is told besides x_t and t: tensors whose first dimension is the batch."""


class Network(ABC):
    """A denoiser in posterior-mean form, mu(x_t, t, condition).

    module: the network whose parameters are trained or frozen, in eval mode: DMD disables
    dropout in all networks (B.1, B.2). shape: (C, H, W) of one sample.
    """

    module: nn.Module
    noise: Noise
    prediction: Prediction
    shape: tuple[int, int, int]
    family: str
    license: str
    sigma_data: float = 0.5
    classes: int | None = None
    """How many a class-conditional network knows; None: it is told something else."""

    downscale: int = 1
    """Pixels a side that one value of a sample stands for: 8 of most latents."""

    latent_scale: float | None = None
    """What a VAE's latents are multiplied by for the network; None of one that draws pixels."""

    decoder: nn.Module | None = None
    """The VAE's half that draws, of latents, where there is one."""

    file_dtype: torch.dtype = torch.float32
    """A student's weights on disk."""

    lora_targets: str = r".*"
    """A regular expression for the names of the layers that adapters go on."""

    lora_metadata: Mapping[str, str] = MappingProxyType({})
    """What a LoRA for this network says of itself, for programs to list it by."""

    middle: str = ""
    """The layer of the module that the discriminator reads; empty: none is known."""

    @abstractmethod
    def predict_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The estimate of x0, like x_t: (B, C, H, W); t: (B,) timesteps 0..999."""

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What its middle makes of x_t: (B, C, H', W') float32, of tokens and vectors H' = W' = 1.

        What comes behind the middle is not computed. Raises UserError where none is known.
        """
        reached: list[Tensor] = []
        # a spread module keeps account of its calls: none may end early
        may_end = not is_spread(next(self.module.parameters()))

        def look(_: nn.Module, __: object, output: Any) -> None:
            # blocks may return more: what skips them, or the text's tokens, which are fewer
            parts = [output] if isinstance(output, Tensor) else output
            reached.append(max((p for p in parts if isinstance(p, Tensor)), key=Tensor.numel))
            if may_end:
                raise _ReachedError

        hook = self.module.get_submodule(self.middle).register_forward_hook(look)
        try:
            with contextlib.suppress(_ReachedError):
                self.predict_x0(x_t, t, condition)
        finally:
            hook.remove()
        if not (self.middle and reached):
            raise UserError(f"images: {self.family} networks have no middle that is known here.")
        return _as_map(reached[0].float())

    @abstractmethod
    def null_condition(self, condition: Condition) -> Condition:
        """The condition of the same batch size that stands for "no condition"."""

    @abstractmethod
    def file_metadata(self) -> dict[str, str]:
        """What a file of these weights must say so that the network can be built again."""

    def file_tensors(self) -> dict[str, Tensor]:
        """The weights under the names they have in a file."""
        return self.renamed(self.module.state_dict())

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by their names in the module -> by those that they have in a file."""
        return weights

    def canonical_name(self, name: str) -> str:
        """A layer or a weight of the module, as checkpoints and LoRAs call it.

        One model may be built of differently named modules, as Stable Diffusion is by diffusers and
        by ComfyUI; its runs are written down alike.
        """
        return name

    def denoising_weight(self, t: Tensor) -> Tensor:
        """The teacher's own training weight per sample, on |mu - x0|^2. (B,) float64."""
        alpha, sigma = self.noise.alpha(t), self.noise.sigma(t)
        return denoising_weight(self.prediction, alpha, sigma, self.sigma_data)

    def to_images(self, x0: Tensor) -> Tensor:
        """Pictures in [-1, 1], (B, 1 or 3, H', W'), of x0: (B, C, H, W); latents are decoded."""
        return x0

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures with their gradient, (B, 1 or 3, H', W') about -1..1, of x0: (B, C, H, W)."""
        return x0

    def encode(self, images: Tensor) -> Tensor:
        """x0, (B, C, H, W), of pictures in [-1, 1]: (B, 1 or 3, H', W').

        Raises UserError where there is nothing to encode latents by.
        """
        return images

    def freeze(self) -> None:
        """The module is not trained from here on, but may carry adapters."""
        self.module.eval().requires_grad_(False)

    def checkpoint_gradients(self, checkpoint: Callable[..., Any] | None = None) -> None:
        """Recompute activations in the backward pass, by `checkpoint` or torch's own.

        Raises UserError where the module cannot.
        """
        enable = getattr(self.module, "enable_gradient_checkpointing", None)
        if enable is None:
            raise UserError(
                f"gradient_checkpointing: {self.family} networks cannot. Set it to false."
            )
        enable(checkpoint)

    def copy(self) -> Self:
        """The same network with parameters of its own."""
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module)
        return other

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


class _ReachedError(Exception):
    """A network's middle has its output, and the rest need not be computed."""


def _as_map(features: Tensor) -> Tensor:
    """(B, C, H, W) as it is; (B, C), and the mean over tokens, as (B, C, 1, 1).

    Tokens are (B, N, C), or (B, T, H, W, C) where a network keeps their places (Cosmos Predict2).
    """
    if features.dim() in (3, 5):
        features = features.flatten(1, -2).mean(dim=1)
    return features if features.dim() == 4 else features[:, :, None, None]


class Wrapped(Network):
    """`network` under another name; a subclass says what is different about it.

    It has every attribute that Network declares, as it is now.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        for name in Network.__annotations__:
            setattr(self, name, getattr(network, name))

    def predict_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network.predict_x0(x_t, t, condition)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network.features(x_t, t, condition)

    def null_condition(self, condition: Condition) -> Condition:
        return self.network.null_condition(condition)

    def denoising_weight(self, t: Tensor) -> Tensor:
        return self.network.denoising_weight(t)

    def to_images(self, x0: Tensor) -> Tensor:
        return self.network.to_images(x0)

    def encode(self, images: Tensor) -> Tensor:
        return self.network.encode(images)

    def canonical_name(self, name: str) -> str:
        return self.network.canonical_name(name)

    def file_tensors(self) -> dict[str, Tensor]:
        return self.network.file_tensors()

    def renamed(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.network.renamed(weights)

    def file_metadata(self) -> dict[str, str]:
        return self.network.file_metadata()

    def freeze(self) -> None:
        self.network.freeze()

    @property
    def device(self) -> torch.device:
        return self.network.device

    def checkpoint_gradients(self, checkpoint: Callable[..., Any] | None = None) -> None:
        self.network.checkpoint_gradients(checkpoint)


def guided_x0(
    network: Network, x_t: Tensor, t: Tensor, condition: Condition, guidance: float
) -> Tensor:
    """Classifier-free guidance, mu_0 + s (mu_c - mu_0), [uncond, cond] in one batch (DMD 3.4).

    Guidance 1 is the plain conditional prediction. Linear in mu as in eps: alpha_t and sigma_t
    are shared.
    """
    if guidance == 1:
        return network.predict_x0(x_t, t, condition)
    null = network.null_condition(condition)
    both = {key: torch.cat([null[key], condition[key]]) for key in condition}
    mu = network.predict_x0(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    unconditional, conditional = mu.chunk(2)
    return unconditional + guidance * (conditional - unconditional)
