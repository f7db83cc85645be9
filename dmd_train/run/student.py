"""The student as a file: weights, recipe, and what is needed to build the network again."""

from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from ..errors import UserError
from ..files.write import write_safetensors
from ..method.network import Network
from ..method.noise import VP
from ..method.recipe import Recipe
from ..networks import Loaded


def one_step_recipe(loaded: Loaded, config: Config) -> Recipe:
    """One evaluation at config.conditioning_timestep; at the last, plain sampling is right.

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
    if timestep != teacher.noise.last and not isinstance(teacher.noise, VP):
        raise UserError(f"conditioning_timestep: {teacher.family} networks have 999 alone.")
    return Recipe(
        family=teacher.family,
        prediction=teacher.prediction,
        timesteps=(timestep,),
        noise_scale=teacher.noise.start_scale,
        baked_guidance=config.guidance,
        teacher=loaded.source,
        teacher_sha256=loaded.sha256,
        license=teacher.license,
    )


def write_weights(
    path: Path,
    tensors: dict[str, Tensor],
    recipe: Recipe,
    network: Network,
    dtype: torch.dtype,
    beside: dict[str, Tensor] | None = None,
) -> None:
    """Weights under their names in a file, with the recipe of `network`'s student. Atomic.

    beside: other weights, which keep their dtype.
    """
    channels, height, width = network.shape
    pixels = (channels, network.downscale * height, network.downscale * width)
    metadata = recipe.to_metadata(f"{recipe.teacher}, {recipe.nfe} step", pixels)
    metadata |= network.file_metadata()
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    write_safetensors(path, cast | (beside or {}), metadata)


def write_student(
    path: Path, student: Network, recipe: Recipe, tensors: dict[str, Tensor] | None = None
) -> None:
    """The student of a run, over an older one: a LoRA, or the network's weights (`tensors`)."""
    write_weights(path, tensors or student.file_tensors(), recipe, student, student.file_dtype)
