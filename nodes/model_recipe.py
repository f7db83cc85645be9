"""A recipe on a ComfyUI MODEL: kept as an attachment, made true by its model_sampling."""

import math
from collections.abc import Callable
from typing import Any

import comfy.model_base
import comfy.model_sampling
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..dmd_train.errors import UserError
from ..dmd_train.families import FAMILIES
from ..dmd_train.method.noise import EDM, TIMESTEPS, Flow
from ..dmd_train.method.recipe import Recipe
from .edm_model import EDMConfig

ATTACHMENT = "dmd_recipe"

EDM_TYPES = (comfy.model_base.ModelType.EDM, comfy.model_base.ModelType.FLOW_COSMOS)
"""Types whose samplers start from sigma_max N(0, I)."""

OTHER_SIZE = 1024
"""Pixels a side, of a family that is known to ComfyUI alone."""


def recipe_of(model: ModelPatcher) -> Recipe | None:
    """The recipe that the MODEL was given, by its file or by DMD Model Sampling."""
    recipe: Recipe | None = model.get_attachment(ATTACHMENT)
    return recipe


def family_of(model: ModelPatcher) -> str:
    """Our name of the MODEL's family, or ComfyUI's where we have none."""
    config = model.model.model_config
    if isinstance(config, EDMConfig):
        return config.family
    for family in FAMILIES.values():
        classes = tuple(getattr(comfy.supported_models, name, ()) for name in family.comfy)
        if isinstance(config, tuple(kind for kind in classes if kind)):
            return family.name
    return type(config).__name__


def native_size(model: ModelPatcher) -> int:
    """Width and height, in pixels, of the pictures that the MODEL was made for."""
    config = model.model.model_config
    if isinstance(config, EDMConfig):
        return config.native_size
    family = FAMILIES.get(family_of(model))
    is_v = model.model.model_type == comfy.model_base.ModelType.V_PREDICTION
    return family.native_size("v" if is_v else "eps") if family else OTHER_SIZE


def with_recipe(model: ModelPatcher, recipe: Recipe) -> ModelPatcher:
    """The MODEL, sampled right by stock samplers at the recipe's number of steps and cfg 1.

    Stock samplers start at sigma_max with noise of variance 1 + sigma_max^2, which the model's
    input scaling makes unit variance. A student conditioned at t < 999 therefore needs a schedule
    that ends at its t: the noisiest sigma is then sigma(t), and its input noise_scale N(0, I). A
    flow starts from N(0, I) at sigma = 1, which is t = 999, as it is; for more steps it gets the
    shift that they were trained with.
    Raises UserError if the MODEL is of another family, or of a kind that has no such timesteps.
    """
    is_edm = model.model.model_type in EDM_TYPES
    family = family_of(model)
    if (recipe.prediction == "edm") != is_edm:
        kind = "an" if is_edm else "no"
        raise UserError(
            f"the recipe has {recipe.prediction} timesteps, but the model ({family}) is {kind} EDM "
            "model: choose 'from the file' in DMD Model Sampling"
        )
    if not is_edm and recipe.family != family:
        raise UserError(f"the recipe is for {recipe.family}, the model is {family}")
    if recipe.prediction == "flow":
        _require_flow(model, recipe)
    patched = model.clone()
    patched.set_attachments(ATTACHMENT, recipe)
    if recipe.prediction == "edm" or (recipe.prediction == "flow" and recipe.nfe == 1):
        return patched
    base = patched.model
    sampling = comfy.model_base.model_sampling(base.model_config, base.model_type)
    if recipe.prediction == "flow":
        _set_shift(sampling, recipe.shift, family)
        patched.add_object_patch("model_sampling", sampling)
        return patched
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        raise UserError(f"the model ({family}) has no timesteps 0 to 999 to choose from")
    sampling.set_sigmas(sampling.sigmas[: recipe.timesteps[0] + 1])
    if recipe.noise_scale != 1:
        sampling.noise_scaling = _scaled(sampling.noise_scaling, recipe.noise_scale)
    patched.add_object_patch("model_sampling", sampling)
    return patched


def _scaled(noise_scaling: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    """A model_sampling's noise_scaling, which starts from N(0, I), starting from scale N(0, I)."""

    def scaled(
        sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False
    ) -> Tensor:
        noise = scale * noise if max_denoise else noise
        return noise_scaling(sigma, noise, latent_image, max_denoise)

    return scaled


def _require_flow(model: ModelPatcher, recipe: Recipe) -> None:
    """Raises UserError where stock samplers do not start this recipe from N(0, I) at sigma = 1."""
    family = family_of(model)
    if recipe.timesteps[0] != TIMESTEPS - 1:
        raise UserError(
            f"the recipe begins at t = {recipe.timesteps[0]}, but a flow model ({family}) begins "
            f"at t = {TIMESTEPS - 1} alone: use a student with that recipe"
        )
    sampling = model.get_model_object("model_sampling")
    is_flow = type(sampling).noise_scaling is comfy.model_sampling.CONST.noise_scaling
    scale = getattr(sampling, "noise_scale", 1.0)  # newer than 0.3.75
    starts_at_1 = math.isclose(float(sampling.sigma_max), 1, rel_tol=1e-5)  # shifts round
    if not is_flow or not starts_at_1 or scale != recipe.noise_scale:
        raise UserError(
            f"the recipe starts from noise of {recipe.noise_scale:g} at sigma = 1, and the model "
            f"({family}) does not: take the model that the student was made from"
        )


def _set_shift(sampling: Any, shift: float, family: str) -> None:
    """Raises UserError for a flow whose timesteps have no such shift."""
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow):
        sampling.set_parameters(shift=shift, multiplier=sampling.multiplier)
    elif isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        sampling.set_parameters(shift=math.log(shift))
    else:
        raise UserError(
            f"the recipe has several steps, which this kind of flow model ({family}) is not "
            "known to take: use a one-step student"
        )


def sigmas_of(model: ModelPatcher, recipe: Recipe) -> torch.Tensor:
    """The recipe's noise levels on the MODEL's own schedule, and the zero that ends them."""
    sampling = model.get_model_object("model_sampling")
    table = sampling.sigmas
    if recipe.prediction in ("edm", "flow"):  # whose tables have any length
        noise = (
            Flow(recipe.shift)
            if recipe.prediction == "flow"
            else EDM(float(sampling.sigma_min), float(sampling.sigma_max))
        )
        later = noise.sigma(torch.tensor(recipe.timesteps[1:]))
        chosen = torch.cat([table[-1:].cpu(), later.to(table.dtype)])
    else:
        chosen = table[list(recipe.timesteps)].cpu()
    return torch.cat([chosen, torch.zeros(1)])
