"""The losses, one small class each. Symbols as in the DMD paper (CVPR 2024)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .network import Condition, Network, guided_x0
from .noise import per_sample
from .seeding import randn

NORMALISER_EPSILON = 1e-6
"""The least normaliser: keeps g finite where x equals mu_real; nan_to_num would hide faults."""


def draw_timesteps(low: int, high: int, batch: int, gen: torch.Generator) -> Tensor:
    """Uniform integers, (batch,), both ends included."""
    return torch.randint(low, high + 1, (batch,), generator=gen, device=gen.device)


def with_gradient(x: Tensor, g: Tensor) -> Tensor:
    """The scalar whose gradient with respect to x is g / numel(x), and whose value is mean(g^2)/2.

    Algebraically 1/2 mean (x - sg[x - g])^2 (DMD algorithm 2), written so that rounding of
    x - (x - g) does not enter.
    """
    return 0.5 * (x - x.detach() + g.detach()).square().mean()


@dataclass
class DistributionMatching:
    """Reverse KL between student and teacher, diffused (DMD eq 7, algorithm 2).

    g = (mu_fake - mu_real) / mean_{C,H,W} |x - mu_real| per sample: the paper's pseudo-code, which
    drops the alpha_t that its eq 7 and 8 leave. mu_real is guided, in the denominator too.
    Timesteps are t_min..t_max, both included.
    """

    teacher: Network
    critic: Network
    guidance: float = 1.0
    t_min: int = 20
    t_max: int = 980

    @torch.no_grad()
    def gradient(self, x: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> Tensor:
        """x, eps: (B, C, H, W); t: (B,) -> g, (B, C, H, W). Both denoisers see the same x_t."""
        x_t = self.teacher.noise.add(x, eps, t)
        mu_real = guided_x0(self.teacher, x_t, t, condition, self.guidance)
        mu_fake = self.critic.predict_x0(x_t, t, condition)
        normaliser = (x - mu_real).abs().mean(dim=(1, 2, 3), keepdim=True)
        return (mu_fake - mu_real) / normaliser.clamp(min=NORMALISER_EPSILON)

    def draw(self, shape: torch.Size, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) and noise (B, C, H, W) for samples of `shape`."""
        return draw_timesteps(self.t_min, self.t_max, shape[0], gen), randn(shape, gen)

    def __call__(self, x: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> Tensor:
        """x: the student's samples, with gradient -> scalar. It says nothing about progress."""
        return with_gradient(x, self.gradient(x.detach(), condition, t, eps))


Distance = Callable[[Tensor, Tensor], Tensor]
"""(samples, targets), each (B, C, H, W) -> scalar. The regression holds the student's sample to the
teacher's from the same noise by one (DMD eq 9)."""


def pseudo_huber(x_ref: Tensor, y_ref: Tensor) -> Tensor:
    """sqrt(|x - y|^2 + c^2) - c with c = 0.00054 sqrt(d) (Song and Dhariwal 2023, 3.3).

    Over all d values of a sample, divided by sqrt(d), so that its scale is that of |x - y|.
    """
    d = x_ref[0].numel()
    c = 0.00054 * d**0.5
    square = (x_ref - y_ref).square().sum(dim=(1, 2, 3))
    distances: Tensor = ((square + c**2).sqrt() - c) / d**0.5
    return distances.mean()


@dataclass
class Denoising:
    """The critic's loss: denoise the student's samples, weighted as the teacher was (DMD eq 6).

    Timesteps over the full range, without guidance.
    """

    critic: Network

    def draw(self, shape: torch.Size, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) and noise (B, C, H, W) for samples of `shape`."""
        return draw_timesteps(0, self.critic.noise.last, shape[0], gen), randn(shape, gen)

    def __call__(self, x: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> Tensor:
        """x, eps: (B, C, H, W); t: (B,) -> scalar. No gradient reaches the student."""
        x = x.detach()
        mu_fake = self.critic.predict_x0(self.critic.noise.add(x, eps, t), t, condition)
        weight = per_sample(self.critic.denoising_weight(t))
        return (weight * (mu_fake - x).square()).mean().to(x.dtype)
