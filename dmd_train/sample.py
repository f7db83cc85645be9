"""Sampling: the student by its recipe, the teacher by Heun's method."""

import torch
from torch import Tensor

from .network import Condition, Network, guided_x0
from .noise import per_sample
from .recipe import Recipe
from .seeding import generator, randn

HEUN_STEPS = 18
"""A teacher's, where nobody says otherwise: 35 NFE (EDM table 2)."""


def step_noise(
    shape: tuple[int, int, int], count: int, seed: int, nfe: int, device: torch.device
) -> list[Tensor]:
    """One N(0, I) tensor (count, C, H, W) for each evaluation.

    Drawn on the CPU, and image i from (seed, i) alone: the same seed gives the same picture in any
    batch and on any device.
    """
    cpu = torch.device("cpu")
    noise = [
        [randn(shape, generator(cpu, seed, "sample", i, step)) for i in range(count)]
        for step in range(nfe)
    ]
    return [torch.stack(images).to(device) for images in noise]


def sample_student(
    network: Network, recipe: Recipe, condition: Condition, noise: list[Tensor]
) -> Tensor:
    """len(recipe.timesteps) evaluations without guidance (DMD2 4.4). noise: see step_noise.

    With one timestep, G(z) = mu(noise_scale z, t): the generator that training saw. Gradients
    flow if the caller lets them. Returns x0, (B, C, H, W).
    """
    timesteps = [torch.full((len(noise[0]),), t, device=noise[0].device) for t in recipe.timesteps]
    x0 = network.predict_x0(recipe.noise_scale * noise[0], timesteps[0], condition)
    for t, eps in zip(timesteps[1:], noise[1:], strict=True):
        x0 = network.predict_x0(network.noise.add(x0, eps, t), t, condition)
    return x0


@torch.no_grad()
def sample_heun(
    network: Network,
    z: Tensor,
    condition: Condition,
    steps: int = HEUN_STEPS,
    guidance: float = 1.0,
) -> Tensor:
    """EDM's deterministic second-order sampler (EDM algorithm 1, S_churn = 0): 2 steps - 1 NFE.

    z: (B, C, H, W) ~ N(0, I). The grid is linear in the timestep, which for EDM noise is Karras's.
    alpha must be 1, as it is there.
    """
    timesteps = torch.linspace(network.noise.last, 0, steps, dtype=torch.float64, device=z.device)
    x = network.noise.start_scale * z
    for i, timestep in enumerate(timesteps):
        t = timestep.expand(len(x))
        sigma = per_sample(network.noise.sigma(t)).to(x.dtype)
        slope = (x - guided_x0(network, x, t, condition, guidance)) / sigma
        if i == steps - 1:
            return x - sigma * slope
        t_next = timesteps[i + 1].expand(len(x))
        sigma_next = per_sample(network.noise.sigma(t_next)).to(x.dtype)
        euler = x + (sigma_next - sigma) * slope
        slope_next = (euler - guided_x0(network, euler, t_next, condition, guidance)) / sigma_next
        x = x + (sigma_next - sigma) * (slope + slope_next) / 2
    raise ValueError("steps must be at least 1")


@torch.no_grad()
def draw(
    network: Network, recipe: Recipe | None, noise: list[Tensor], condition: Condition
) -> Tensor:
    """By the student's recipe; a teacher, which has none, by Heun's method from noise[0]."""
    if recipe:
        return sample_student(network, recipe, condition, noise)
    return sample_heun(network, noise[0], condition)
