"""The forward process x_t = alpha_t x0 + sigma_t eps, and what a prediction says about x0.

A timestep t is an index 0..999, small = little noise, for every family (DMD section 3.1, B.1).
"""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

TIMESTEPS = 1000

Prediction = Literal["eps", "v", "flow", "edm"]


def per_sample(value: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to scale images (B, C, H, W)."""
    return rearrange(value, "b -> b 1 1 1")


class Noise(ABC):
    """One family's alpha_t and sigma_t over the timesteps t = 0..999."""

    @property
    def last(self) -> int:
        """The noisiest timestep, at which a one-step student is conditioned."""
        return TIMESTEPS - 1

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """t: (B,) -> (B,) float64."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """t: (B,) -> (B,) float64."""

    @property
    @abstractmethod
    def start_scale(self) -> float:
        """Standard deviation of the noise that sampling starts from."""

    def add(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """q(x_t | x0): x_t = alpha_t x0 + sigma_t eps (DMD eq 3). x0, eps: (B, C, H, W); t: (B,).

        Computed in float64, returned in x0's dtype.
        """
        x_t = per_sample(self.alpha(t)) * x0 + per_sample(self.sigma(t)) * eps
        return x_t.to(x0.dtype)


class VP(Noise):
    """Variance preserving, alpha^2 + sigma^2 = 1, from a table of cumulative products of 1 - beta.

    Sampling starts from unit variance: Stable Diffusion's abar_999 = 0.0047 is not zero, yet its
    samplers feed plain N(0, I).
    """

    start_scale = 1.0

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.double()

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012) -> "VP":
        """The schedule of Stable Diffusion 1.x, 2.x and XL: sqrt(beta) is linear."""
        root = torch.linspace(beta_start**0.5, beta_end**0.5, TIMESTEPS, dtype=torch.float64)
        return cls(torch.cumprod(1 - root**2, dim=0))

    def _table(self, t: Tensor) -> Tensor:
        if self.alphas_cumprod.device != t.device:
            self.alphas_cumprod = self.alphas_cumprod.to(t.device)
        return self.alphas_cumprod[t.long()]

    def alpha(self, t: Tensor) -> Tensor:
        return self._table(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._table(t)).sqrt()


class EDM(Noise):
    """alpha = 1 and Karras sigmas, index 0 the smallest (DMD B.1; EDM eq 5 with rho = 7).

    The index may be fractional: a grid of N Karras steps is linear in it.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    @property
    def start_scale(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma: Tensor = (low + t.double() / self.last * (high - low)) ** self.rho
        return sigma


class Flow(Noise):
    """Rectified flow: x_t = (1 - s) x0 + s eps, s = shift r / (1 + (shift - 1) r), r = (t+1)/T."""

    start_scale = 1.0

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        r = (t.double() + 1) / TIMESTEPS
        return self.shift * r / (1 + (self.shift - 1) * r)


class EDMScalings(NamedTuple):
    """EDM's preconditioning, each (B,) float64: D = c_skip x_t + c_out F(c_in x_t, c_noise)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_scalings(sigma: Tensor, sigma_data: float) -> EDMScalings:
    """sigma: (B,) -> the four scalings (EDM table 1)."""
    total = sigma**2 + sigma_data**2
    return EDMScalings(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=total.rsqrt(),
        c_noise=sigma.log() / 4,
    )


def x0_from(
    prediction: Prediction,
    output: Tensor,
    x_t: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    """The posterior mean that a network's output stands for. output, x_t: (B, C, H, W).

    In float64: at t = 999 Stable Diffusion divides by alpha = 0.068, which would amplify
    rounding 15 times. alpha, sigma: (B,) float64. Returned in x_t's dtype.
    """
    a, s = per_sample(alpha), per_sample(sigma)
    out, x = output.double(), x_t.double()
    match prediction:
        case "eps":  # DMD eq 11
            x0 = (x - s * out) / a
        case "v":  # v = alpha eps - sigma x0
            x0 = a * x - s * out
        case "flow":  # u = eps - x0
            x0 = x - s * out
        case "edm":  # F
            c = edm_scalings(sigma, sigma_data)
            x0 = per_sample(c.c_skip) * x + per_sample(c.c_out) * out
    return x0.to(x_t.dtype)


def denoising_weight(
    prediction: Prediction, alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5
) -> Tensor:
    """Weight of |mu - x0|^2 that equals a plain squared error on the network's own output.

    eps: SNR; v: SNR + 1; edm: sigma^-2 + sigma_data^-2 (DMD algorithm 3). (B,) float64.
    """
    match prediction:
        case "eps":
            return (alpha / sigma) ** 2
        case "v" | "flow":
            return sigma**-2
        case "edm":
            return sigma**-2 + sigma_data**-2
