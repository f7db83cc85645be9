"""A MODEL's noise in the engine's terms."""

import math

import comfy.model_sampling as sampling
from comfy.model_patcher import ModelPatcher

from ..dmd_train.errors import UserError
from ..dmd_train.method.noise import EDM, TIMESTEPS, VP, Flow, Noise, Prediction

NO_TABLE = (sampling.ModelSamplingDiscreteEDM, sampling.StableCascadeSampling)
"""Discrete schedules by name whose timesteps are no indices."""

EDM_NOISE = (sampling.EDM, sampling.COSMOS_RFLOW)
"""x_t = x0 + sigma eps, sampled from sigma_max on. Cosmos Predict2's flow is scaled to it."""


def noise_of(model: ModelPatcher) -> tuple[Noise, Prediction]:
    """A MODEL's noise over the engine's 1000 timesteps, and what its network predicts.

    Raises UserError for a few-step model and for a kind of noise that is not known here.
    """
    own = model.get_model_object("model_sampling")
    is_unit = getattr(own, "noise_scale", 1.0) == 1  # of 0.33
    is_flow = type(own).calculate_denoised is sampling.CONST.calculate_denoised and is_unit
    if is_flow and isinstance(own, sampling.ModelSamplingDiscreteFlow):
        return Flow(own.shift), "flow"
    if is_flow and isinstance(own, sampling.ModelSamplingFlux):
        return Flow(math.exp(own.shift)), "flow"
    if isinstance(own, sampling.ModelSamplingContinuousEDM) and isinstance(own, EDM_NOISE):
        return EDM(float(own.sigma_min), float(own.sigma_max)), "edm"
    is_table = isinstance(own, sampling.ModelSamplingDiscrete) and not isinstance(own, NO_TABLE)
    if is_table and isinstance(own, sampling.EPS) and not isinstance(own, sampling.X0):
        if len(own.sigmas) != TIMESTEPS:
            raise UserError(
                f"model: it has {len(own.sigmas)} timesteps, as few-step models do. Wire the "
                "many-step model that it was made from."
            )
        prediction: Prediction = "v" if isinstance(own, sampling.V_PREDICTION) else "eps"
        return VP(1 / (1 + own.sigmas.double() ** 2)), prediction
    kinds = ", ".join(kind.__name__ for kind in type(own).__mro__[1:3])
    raise UserError(f"model: its noise ({kinds}) is not one that DMD is defined for here.")
