"""Networks small enough for a test: exact ones, learned-sized ones, and one that takes notes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmd_train.config import Config, make_config
from dmd_train.data.pairs import Pairs, StoredPairs
from dmd_train.files.shards import Shards
from dmd_train.method.network import Condition, Network, Wrapped
from dmd_train.method.noise import EDM, Noise, per_sample
from dmd_train.method.objectives import Denoising, DistributionMatching
from dmd_train.method.recipe import Recipe
from dmd_train.networks.edm import EDMNetwork


class Bare(Network):
    """What a network of a test need not say for itself. No condition is label -1."""

    prediction = "edm"
    family, license = "bare", "none"
    device = torch.device("cpu")

    def null_condition(self, condition: Condition) -> Condition:
        return {key: torch.full_like(value, -1) for key, value in condition.items()}

    def file_metadata(self) -> dict[str, str]:
        return {}


class Exact(Bare):
    """A denoiser given as a formula mean(x_t, alpha, sigma, condition) in float64."""

    def __init__(
        self,
        mean: Callable[[Tensor, Tensor, Tensor, Condition], Tensor],
        shape: tuple[int, int, int] = (1, 1, 1),
        noise: Noise | None = None,
    ) -> None:
        self.module, self.mean, self.shape = nn.Identity(), mean, shape
        self.noise = noise or EDM()

    def predict_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = per_sample(self.noise.alpha(t)), per_sample(self.noise.sigma(t))
        return self.mean(x_t.double(), alpha, sigma, condition).to(x_t.dtype)


def gaussian(
    m: float, s: float, shape: tuple[int, int, int] = (1, 1, 1), noise: Noise | None = None
) -> Exact:
    """E[x0 | x_t] for x0 ~ N(m, s^2): (alpha s^2 x_t + sigma^2 m) / (alpha^2 s^2 + sigma^2)."""
    return Exact(
        lambda x, a, sigma, _: (a * s**2 * x + sigma**2 * m) / (a**2 * s**2 + sigma**2),
        shape,
        noise,
    )


def constant(value: float, shape: tuple[int, int, int] = (1, 1, 1)) -> Exact:
    """A denoiser that always answers `value`."""
    return Exact(lambda x, *_: torch.full_like(x, value), shape)


@dataclass
class Call:
    """What a denoiser was given."""

    x_t: Tensor
    t: Tensor
    condition: Condition
    grad: bool


class Recorded(Wrapped):
    """The network it holds, taking notes of every evaluation."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.calls: list[Call] = []

    def predict_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls.append(Call(x_t.detach().clone(), t, condition, torch.is_grad_enabled()))
        return super().predict_x0(x_t, t, condition)


class RawMLP(nn.Module):
    """F(x, c_noise, label) over the flattened sample."""

    def __init__(
        self, shape: tuple[int, int, int], classes: int, width: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        self.label = nn.Embedding(classes + 1, width)
        self.enter = nn.Linear(size + 1, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.leave = nn.Linear(width, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        h = self.enter(torch.cat([x.flatten(1), c_noise[:, None]], dim=1)) + self.label(label)
        for layer in self.hidden:
            h = layer(self.dropout(nn.functional.silu(h)))
        return self.leave(self.dropout(nn.functional.silu(h))).view_as(x)


def edm_mlp(
    shape: tuple[int, int, int] = (2, 3, 2),
    classes: int = 3,
    width: int = 16,
    layers: int = 2,
    dropout: float = 0.0,
    sigma_data: float = 0.5,
    seed: int = 0,
) -> EDMNetwork:
    """A small random MLP with the engine's own EDM preconditioning."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = RawMLP(shape, classes, width, layers, dropout)
    return EDMNetwork(
        module,
        family="tiny",
        shape=shape,
        classes=classes,
        sigma_data=sigma_data,
        license="none",
        middle="hidden.0",
    )


def labels(batch: int, classes: int = 3) -> Condition:
    """0, 1, 2, 0, 1, 2, ..."""
    return {"label": torch.arange(batch) % classes}


def drawn(
    objective: DistributionMatching | Denoising,
    x: Tensor,
    condition: Condition,
    gen: torch.Generator,
) -> Tensor:
    """The loss, at timesteps and noise that the objective itself draws."""
    return objective(x, condition, *objective.draw(x.shape, gen))


class InMemory(Shards):
    """Rows that were never on disk, in the dtype that they have."""

    def __init__(self, **columns: Tensor) -> None:
        self.parts = [columns]
        self.ends = torch.tensor([len(next(iter(columns.values())))])


def pairs_of(noise: Tensor, image: Tensor, row: Tensor) -> Pairs:
    """noise, image: (N, C, H, W); row: (N,) of the conditions."""
    seed = torch.arange(len(noise))
    return StoredPairs(InMemory(seed=seed, row=row, noise=noise, image=image))


def config(**values: Any) -> Config:
    """A run of a few small steps, whatever the presets say."""
    few = {
        "teacher": "tiny",
        "output": "unused",
        "training": "full",
        "steps": 20,
        "batch_size": 8,
        "learning_rate": 5e-4,
        "warmup_steps": 0,
        "schedule": "constant",
        "ema_decay": 0.9,
        "regression_weight": 1.0,
        "pair_batch_size": 5,
    }
    return make_config(few | values, "test")


def recipe(**values: Any) -> Recipe:
    """The one-step recipe of an EDM student."""
    plain = {
        "family": "tiny",
        "prediction": "edm",
        "timesteps": (999,),
        "noise_scale": 80.0,
        "teacher": "tiny",
        "teacher_sha256": "0" * 64,
        "license": "none",
    }
    return Recipe(**{**plain, **values})
