"""A network from disk, and what becomes of it: the recipe of its student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..config import Config
from ..errors import UserError
from ..method.network import Network
from ..method.noise import VP, Flow
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


def student_recipe(loaded: Loaded, config: Config) -> Recipe:
    """The recipe of its student: an evaluation at each of config.timesteps.

    Where the first is the last of the noise, plain sampling starts right.
    Raises UserError if the teacher is a student already, or its noise has a scale of its own at
    each timestep and the first is another.
    """
    teacher = loaded.network
    if loaded.recipe:
        raise UserError(
            f"teacher: {config.teacher} is a {loaded.recipe.nfe}-step student already. "
            f"Give the model that it was made from ({loaded.recipe.teacher})."
        )
    is_few = len(config.timesteps) > 1  # one step of a flow is at sigma = 1, whatever its shift
    first, last = config.timesteps[0], teacher.noise.last
    if first != last and not isinstance(teacher.noise, VP):
        raise UserError(
            f"timesteps: {first}: {teacher.family} networks begin at {last}. Put {last} first."
        )
    scale = teacher.noise.start_scale
    if config.input_noise == "sigma":
        scale = float(teacher.noise.sigma(torch.tensor([first])))
    return Recipe(
        family=teacher.family,
        prediction=teacher.prediction,
        timesteps=config.timesteps,
        sampler=config.sampler,
        shift=teacher.noise.shift if is_few and isinstance(teacher.noise, Flow) else 1.0,
        noise_scale=scale,
        baked_guidance=config.guidance,
        teacher=loaded.source,
        teacher_sha256=loaded.sha256,
        license=teacher.license,
    )
