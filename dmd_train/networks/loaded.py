"""A network from disk, and what becomes of it: the recipe of its one-step student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..config import Config
from ..errors import UserError
from ..method.network import Network
from ..method.noise import VP
from ..method.recipe import Recipe

if TYPE_CHECKING:
    from .text import TextEncoder


@dataclass(frozen=True)
class Loaded:
    """A network and where it came from. recipe: None of a teacher; text: of one told prompts."""

    network: Network
    recipe: Recipe | None
    source: str
    sha256: str
    text: TextEncoder | None = None


def one_step_recipe(loaded: Loaded, config: Config) -> Recipe:
    """The recipe of its student: one evaluation, at config.conditioning_timestep.

    At the last timestep plain sampling is right.
    Raises UserError if the teacher is a student already, or its noise has a scale of its own at
    each timestep.
    """
    teacher = loaded.network
    if loaded.recipe:
        raise UserError(
            f"teacher: {config.teacher} is a {loaded.recipe.nfe}-step student already. "
            f"Give the model that it was made from ({loaded.recipe.teacher})."
        )
    timestep = config.conditioning_timestep
    scale = teacher.noise.start_scale
    if config.input_noise == "sigma":
        scale = float(teacher.noise.sigma(torch.tensor([timestep])))
    if timestep != teacher.noise.last and not isinstance(teacher.noise, VP):
        raise UserError(f"conditioning_timestep: {teacher.family} networks have 999 alone.")
    return Recipe(
        family=teacher.family,
        prediction=teacher.prediction,
        timesteps=(timestep,),
        noise_scale=scale,
        baked_guidance=config.guidance,
        teacher=loaded.source,
        teacher_sha256=loaded.sha256,
        license=teacher.license,
    )
