"""A student on the canvas: an ordinary MODEL that remembers the file it was made by."""

from dataclasses import dataclass
from pathlib import Path

import comfy.sd
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..dmd_train.files.read import read_safetensors
from ..dmd_train.method.recipe import Recipe, read_recipe
from .edm_model import EDMModel
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
    student: Student | None = model.get_attachment(ATTACHMENT)
    return student


def student_model(model: ModelPatcher, file: Path) -> ModelPatcher:
    """The MODEL that a run was begun with -> its student, ready for every stock sampler.

    The weights are patches, as a LoRA's are: nothing of `model` is copied or changed.
    """
    tensors, metadata = read_safetensors(file)
    recipe = read_recipe(metadata, str(file))
    assert recipe
    student = Student(tensors, metadata, recipe)
    if student.is_lora:
        patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)
    else:
        patched = _with_weights(model, tensors)
    patched = with_recipe(patched, recipe)
    patched.set_attachments(ATTACHMENT, student)
    return patched


def _with_weights(model: ModelPatcher, tensors: dict[str, Tensor]) -> ModelPatcher:
    """These weights in the place of the MODEL's own and of everything patched into them."""
    if isinstance(model.model, EDMModel):
        weights = {f"diffusion_model.network.{key}": value for key, value in tensors.items()}
    else:
        weights = {key.removeprefix("model."): value for key, value in tensors.items()}
    patched = model.clone()
    patched.patches = {k: v for k, v in patched.patches.items() if k not in weights}
    patched.add_patches({key: ("set", (value,)) for key, value in weights.items()})
    return patched
