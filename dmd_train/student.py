"""The student as a file: weights, recipe, and what is needed to build the network again."""

from pathlib import Path

from .config import Config
from .files import write_safetensors
from .network import Network
from .networks import Loaded
from .recipe import Recipe


def one_step_recipe(loaded: Loaded, config: Config) -> Recipe:
    """Conditioned at the last timestep, so that plain one-step sampling is right."""
    teacher = loaded.network
    return Recipe(
        family=teacher.family,
        prediction=teacher.prediction,
        timesteps=(teacher.noise.last,),
        noise_scale=teacher.noise.start_scale,
        baked_guidance=config.guidance,
        teacher=loaded.source,
        teacher_sha256=loaded.sha256,
        license=teacher.license,
    )


def write_student(path: Path, student: Network, recipe: Recipe) -> None:
    """Atomically, over an older student of the same run."""
    title = f"{recipe.teacher}, {recipe.nfe} step"
    metadata = recipe.to_metadata(title, student.shape) | student.file_metadata()
    write_safetensors(path, student.module.state_dict(), metadata)
