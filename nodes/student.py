"""A student on the canvas: an ordinary MODEL that remembers the file it was made by."""

from dataclasses import dataclass

import comfy.lora
import comfy.sd
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..dmd_train.errors import UserError
from ..dmd_train.recipe import Recipe
from .model_recipe import with_recipe

ATTACHMENT = "dmd_student"


@dataclass(frozen=True)
class Student:
    """A student's file as written by a run: weights under their names there, and the metadata.

    tensors: of a LoRA `lora_unet_*.lora_down.weight` and so on; else whole weights, of a UNet as
    `model.diffusion_model.*`. metadata: the recipe and what else the file says.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    recipe: Recipe

    @property
    def is_lora(self) -> bool:
        return any(key.endswith(".lora_down.weight") for key in self.tensors)


def student_of(model: ModelPatcher) -> Student | None:
    """What the MODEL was made by, None where it is no student of DMD Distill's."""
    return model.get_attachment(ATTACHMENT)
