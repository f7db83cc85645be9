"""Recipes that a file does not carry itself: to choose from, and those of DMD2's own files.

DMD2's one-step and four-step UNets have the same keys and shapes, so that only a name tells.
"""

import re
from pathlib import Path

from ..method.recipe import Recipe

DMD2_LICENSE = "CC BY-NC-SA 4.0 (non-commercial)"
TRAINING = "checkpoint_model_"
"""In the name of each folder that a DMD2 training run leaves, before the step."""


def _eps(family: str, *timesteps: int) -> Recipe:
    return Recipe(family=family, prediction="eps", timesteps=timesteps, noise_scale=1.0)


RECIPES: dict[str, Recipe] = {
    "SD 1.5, 1 step": _eps("sd1", 999),
    "SDXL, 1 step (t = 399)": _eps("sdxl", 399),
    "SDXL, 2 steps": _eps("sdxl", 999, 499),
    "SDXL, 3 steps": _eps("sdxl", 999, 749, 499),
    "SDXL, 4 steps": _eps("sdxl", 999, 749, 499, 249),
}
"""What a user can choose for a file that does not say (DMD2 4.3, and its own 2 and 3 steps)."""


def _dmd2(recipe: Recipe, teacher: str, guidance: float) -> Recipe:
    known = {"teacher": teacher, "baked_guidance": guidance, "license": DMD2_LICENSE}
    return recipe.model_copy(update=known)


SD15, SDXL = "stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0"
PUBLISHED: dict[tuple[str, int], Recipe] = {
    ("sd1", 1): _dmd2(RECIPES["SD 1.5, 1 step"], SD15, 1.75),
    ("sdxl", 1): _dmd2(RECIPES["SDXL, 1 step (t = 399)"], SDXL, 8.0),
    ("sdxl", 4): _dmd2(RECIPES["SDXL, 4 steps"], SDXL, 8.0),
    ("edm-imagenet64", 1): Recipe(
        family="edm-imagenet64",
        prediction="edm",
        timesteps=(999,),
        noise_scale=80.0,
        teacher="edm-imagenet-64x64-cond-adm",
        license=DMD2_LICENSE,
    ),
}
"""(family, steps) -> the recipe of DMD2's own file."""


def published_recipe(family: str, name: str) -> Recipe | None:
    """DMD2's own, where the name of the file `name`, or of its folder, says which one it is."""
    mark = _dmd2_mark(name)
    if family == "edm-imagenet64":
        # EDM itself ships no state dict: under the name that DMD2 gives, this is DMD2's
        return PUBLISHED[family, 1] if mark or Path(name).name == "pytorch_model.bin" else None
    if mark is None:
        return None
    steps = steps_in(mark)
    if family == "sd1" and TRAINING in mark and not steps:
        steps = 1  # the only kind there is; its folders do not say
    return PUBLISHED.get((family, steps))


def is_dmd2(name: str) -> bool:
    """Whether the file's name, or its folder's, is one that DMD2 gives."""
    return _dmd2_mark(name) is not None


def _dmd2_mark(name: str) -> str | None:
    """The name that says so: dmd2_... of a file, or ..._checkpoint_model_019000 of a folder."""
    file, folder = Path(name).name.lower(), Path(name).parent.name.lower()
    if "dmd2" in file or TRAINING in file:
        return file
    return folder if TRAINING in folder else None


def steps_in(text: str) -> int:
    """4 for "denoising4step", 1 for "1step" or "cond399"; 0 if nothing is said, or two things."""
    told = {int(n) for n in re.findall(r"(?<![\d.])(\d{1,2})[ _-]?steps?(?![a-z])", text)}
    told |= {1} if "cond399" in text else set()
    return told.pop() if len(told) == 1 else 0
