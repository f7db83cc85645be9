"""The adversarial objective of DMD2 (4.3): a head on the critic's middle features tells real images
from the student's samples, both noised."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Conv2d, GroupNorm, Sequential, SiLU, functional

from .network import Condition, Network
from .noise import TIMESTEPS
from .objectives import draw_timesteps
from .processes import Processes
from .roles import Role
from .seeding import generator, randn

SMALLEST = 4
"""Side, in features, down to which the head halves them (DMD2's code)."""


def head(channels: int, height: int, width: int, seed: int) -> Sequential:
    """Features (B, channels, height, width) -> (B, 1, 1, 1) logits; large where they look real.

    DMD2's: halved by 4x4 convolutions down to a side of SMALLEST, then one convolution over what is
    left, then one logit. Weights are a function of the seed.
    """
    layers: list[nn.Module] = []
    while min(height, width) >= 2 * SMALLEST:
        layers += [Conv2d(channels, channels, 4, stride=2, padding=1), *_normed(channels)]
        height, width = height // 2, width // 2
    layers += [Conv2d(channels, channels, (height, width)), *_normed(channels)]
    layers.append(Conv2d(channels, 1, 1))
    for number, layer in enumerate(layers):
        if isinstance(layer, Conv2d):
            gen = generator(layer.weight.device, seed, "head", number)
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=gen)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return Sequential(*layers)


def _normed(channels: int) -> tuple[nn.Module, nn.Module]:
    # a group of one channel, over one value, would be zero whatever it is
    groups = math.gcd(32, max(1, channels // 4))
    return GroupNorm(groups, channels), SiLU()


class Noised(NamedTuple):
    """Samples and what they are noised by. x0, eps: (B, C, H, W); t: (B,)."""

    x0: Tensor
    condition: Condition
    t: Tensor
    eps: Tensor


@dataclass
class Adversarial:
    """Logistic, non-saturating (DMD2 4.3 as its code has it): with D the logit of a noised sample,

    critic and head: mean softplus(D(fake)) + mean softplus(-D(real)); student: mean softplus(-D).
    Timesteps are t_min..t_max, both included: DMD2 has all of them. Without guidance.
    """

    critic: Network
    head: nn.Module
    t_min: int = 0
    t_max: int = TIMESTEPS - 1

    def draw(self, shape: torch.Size, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) and noise (B, C, H, W) for samples of `shape`."""
        return draw_timesteps(self.t_min, self.t_max, shape[0], gen), randn(shape, gen)

    def logit(self, x: Noised) -> Tensor:
        """(B,)"""
        x_t = self.critic.noise.add(x.x0, x.eps, x.t)
        logit: Tensor = self.head(self.critic.features(x_t, x.t, x.condition))
        return logit.flatten()

    def of_critic(self, fake: Noised, real: Noised) -> Tensor:
        """fake: the student's samples -> scalar. No gradient reaches the student."""
        of_fake, of_real = self.logit(_both(fake, real)).split([len(fake.t), len(real.t)])
        return functional.softplus(of_fake).mean() + functional.softplus(-of_real).mean()

    def of_student(self, fake: Noised) -> Tensor:
        """fake: the student's samples, with gradient -> scalar. None reaches critic and head."""
        seen = fake.x0.detach().requires_grad_(True)
        loss = functional.softplus(-self.logit(fake._replace(x0=seen))).mean()
        # no weight of the critic is asked for one: spread networks could not drop it again
        (g,) = torch.autograd.grad(loss, seen)
        return loss.detach() + ((fake.x0 - seen.detach()) * g).sum()


def _both(fake: Noised, real: Noised) -> Noised:
    """One batch; the samples without their gradient."""
    told = {key: torch.cat([fake.condition[key], real.condition[key]]) for key in fake.condition}
    x0 = torch.cat([fake.x0.detach(), real.x0])
    return Noised(x0, told, torch.cat([fake.t, real.t]), torch.cat([fake.eps, real.eps]))


def with_head(
    role: Role, condition: Condition, seed: int, processes: Processes
) -> tuple[Role, nn.Module]:
    """The critic with a head to train, spread as its network is. condition: any, a batch of one."""
    network = role.network
    x = torch.zeros((1, *network.shape), device=network.device)
    t = torch.zeros(1, dtype=torch.int64, device=network.device)
    with torch.no_grad():
        features = network.features(x, t, condition)
    channels, height, width = features.shape[1:]
    own = head(channels, height, width, seed).to(network.device)
    processes.shard(own)
    named = {f"head.{name}": parameter for name, parameter in own.named_parameters()}
    return Role(network, role.parameters | named), own
