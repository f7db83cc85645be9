"""Sampling: the student by its recipe, the teacher by Heun, Euler or a scheduler of diffusers'."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .network import Condition, Network, guided_x0
from .noise import EDM, VP, Flow, Noise, per_sample
from .recipe import Recipe
from .seeding import generator, randn

HEUN_STEPS = 18
"""A teacher's, where nobody says otherwise: 35 NFE (EDM table 2)."""


def step_noise(
    shape: tuple[int, int, int], count: int, seed: int, nfe: int, device: torch.device
) -> list[Tensor]:
    """One N(0, I) tensor (count, C, H, W) for each evaluation.

    Drawn on the CPU: the same seed gives the same pictures in a larger batch and on any device.
    The first is what ComfyUI's samplers start from for this seed.
    """
    cpu = torch.device("cpu")
    first = randn((count, *shape), torch.Generator().manual_seed(seed))
    later = [
        torch.stack([randn(shape, generator(cpu, seed, "sample", i, step)) for i in range(count)])
        for step in range(1, nfe)
    ]
    return [noise.to(device) for noise in (first, *later)]


def sample_student(
    network: Network, recipe: Recipe, condition: Condition, noise: list[Tensor]
) -> Tensor:
    """x0, (B, C, H, W), of all of the recipe's steps. noise: see step_noise."""
    if len(noise) != recipe.nfe:
        raise ValueError(f"{len(noise)} noises for {recipe.nfe} steps")
    return rollout(network, recipe, condition, noise)


def rollout(network: Network, recipe: Recipe, condition: Condition, noise: list[Tensor]) -> Tensor:
    """x0, (B, C, H, W), of the recipe's step len(noise), those before it without gradient.

    An evaluation a step, without guidance (DMD2 4.4); in training, backward simulation (DMD2
    4.5), whose memory is that of one step. With one timestep, G(z) = mu(noise_scale z, t).
    noise: (B, C, H, W) each, N(0, I): the start, then what is added before each further step. A
    deterministic recipe has no use for more than the start.
    """
    x_t, (first, *later) = recipe.noise_scale * noise[0], recipe.timesteps
    t = torch.full((len(x_t),), first, device=x_t.device)
    for following, eps in zip(later, noise[1:], strict=False):
        t_next = torch.full_like(t, following)
        with torch.no_grad():
            x0 = network.predict_x0(x_t, t, condition)
            if recipe.sampler == "deterministic":
                eps = eps_hat(network.noise, x_t, x0, t)
            x_t = network.noise.add(x0, eps, t_next)
        t = t_next
    return network.predict_x0(x_t, t, condition)


def eps_hat(noise: Noise, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The noise that x_t holds where x0 is right, (x_t - alpha x0) / sigma. float64."""
    return (x_t - per_sample(noise.alpha(t)) * x0) / per_sample(noise.sigma(t))


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
def sample_euler(
    network: Network, z: Tensor, condition: Condition, steps: int, guidance: float
) -> Tensor:
    """Euler steps of a rectified flow or of EDM: x' = alpha' mu + sigma' eps_hat. steps NFE.

    z: (B, C, H, W) ~ N(0, I). The grid is even in the timestep: from the last one, a student's,
    down to -1, which stands for x0 itself (Flux's own: black-forest-labs/flux, get_schedule).
    """
    timesteps = torch.linspace(network.noise.last, -1, steps + 1, dtype=torch.float64)
    x = network.noise.start_scale * z
    for timestep, following in pairwise(timesteps.to(z.device)):
        t, t_next = timestep.expand(len(x)), following.expand(len(x))
        mu = guided_x0(network, x, t, condition, guidance)
        x = network.noise.add(mu, eps_hat(network.noise, x, mu, t), t_next)
    return mu


SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "ddim": ("DDIMScheduler", {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "heun": ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
}
"""Stable Diffusion's settings; "trailing" begins at the last timestep, as a student does."""


@torch.no_grad()
def sample_scheduler(
    network: Network, z: Tensor, condition: Condition, sampler: str, steps: int, guidance: float
) -> Tensor:
    """A deterministic sampler of diffusers' on a variance-preserving network.

    z: (B, C, H, W) ~ N(0, I). Returns x0, (B, C, H, W).
    """
    import diffusers  # training only: not for ComfyUI

    assert isinstance(network.noise, VP)
    name, settings = SCHEDULERS[sampler]
    abar = network.noise.alphas_cumprod.cpu()
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    scheduler = getattr(diffusers, name)(
        trained_betas=betas.numpy(), prediction_type="epsilon", **settings
    )
    scheduler.set_timesteps(steps, device=z.device)
    x: Tensor = z * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x_t = scheduler.scale_model_input(x, timestep)
        t = timestep.long().expand(len(x))
        x0 = guided_x0(network, x_t, t, condition, guidance)
        eps = eps_hat(network.noise, x_t, x0, t).to(x.dtype)
        x = scheduler.step(eps, timestep, x, return_dict=False)[0]
    return x


def sample_teacher(
    network: Network, z: Tensor, condition: Condition, sampler: str, steps: int, guidance: float
) -> Tensor:
    """x0 by the sampler of that name (Config.pair_sampler). Raises UserError if there is none."""
    if isinstance(network.noise, VP):
        return sample_scheduler(network, z, condition, sampler, steps, guidance)
    own = {"euler": sample_euler}
    if isinstance(network.noise, EDM):
        own |= {"heun": sample_heun}
    if sampler not in own:
        known = " and ".join(own)
        raise UserError(f"pair_sampler: {sampler}: {network.family} networks have {known} alone.")
    return own[sampler](network, z, condition, steps, guidance)


USUAL: dict[type[Noise], tuple[str, int, float]] = {
    EDM: ("heun", HEUN_STEPS, 1.0),
    VP: ("pndm", 50, 7.5),
    Flow: ("euler", 28, 4.5),
}
"""Sampler, steps and guidance of a teacher: EDM table 2; Stable Diffusion's own; those that the
reference code of SD3.5 (Stability-AI/sd3.5, sd3_infer.py) names for SD3 medium and SD3.5 large."""


@torch.no_grad()
def draw(
    network: Network, recipe: Recipe | None, noise: list[Tensor], condition: Condition
) -> Tensor:
    """x0 by the student's recipe; of a teacher, which has none, as its kind is usually sampled."""
    if recipe:
        return sample_student(network, recipe, condition, noise)
    return sample_teacher(network, noise[0], condition, *USUAL[type(network.noise)])
