"""The teacher's samplers on Stable Diffusion, against diffusers' own loop on the bare UNet."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor
from unit.tiny import edm_mlp, labels
from unit.tiny_sd import SHAPE, Texts, tiny_sd

from dmd_train.errors import UserError
from dmd_train.networks.stable_diffusion import StableDiffusion
from dmd_train.noise import Prediction
from dmd_train.sample import sample_teacher

CPU = torch.device("cpu")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"steps_offset": 1, "set_alpha_to_one": False}
TRAILING = {"timestep_spacing": "trailing"}
# as the published Stable Diffusion repositories configure them
SCHEDULERS = {
    "pndm": lambda: PNDMScheduler(**BETAS, **LEADING, skip_prk_steps=True),
    "ddim": lambda: DDIMScheduler(**BETAS, **LEADING, clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(**BETAS, **TRAILING),
    "heun": lambda: HeunDiscreteScheduler(**BETAS, **TRAILING),
    "dpmpp-2m": lambda: DPMSolverMultistepScheduler(**BETAS, **TRAILING),
}


@torch.no_grad()
def by_diffusers(
    network: StableDiffusion, sampler: str, z: Tensor, text: Tensor, guidance: float
) -> Tensor:
    """The loop of diffusers' pipelines: guidance on the UNet's own output."""
    scheduler = SCHEDULERS[sampler]()
    kind = "v_prediction" if network.prediction == "v" else "epsilon"
    scheduler.register_to_config(prediction_type=kind)
    scheduler.set_timesteps(8)
    both = torch.cat([network.empty["text"].expand_as(text), text])
    x = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(torch.cat([x, x]), t)
        without, with_text = network.module(x_in, t, both).sample.chunk(2)
        x = scheduler.step(without + guidance * (with_text - without), t, x).prev_sample
    return x


# PNDM combines eps over steps, as in its paper; diffusers combines v where a network predicts v
@pytest.mark.parametrize(
    ("sampler", "prediction"),
    [(s, p) for s in SCHEDULERS for p in ("eps", "v") if (s, p) != ("pndm", "v")],
)
def test_a_named_sampler_is_diffusers_with_guidance(sampler: str, prediction: Prediction) -> None:
    network = tiny_sd(prediction=prediction)
    z = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    condition = Texts().take(torch.arange(3), CPU)
    ours = sample_teacher(network, z, condition, sampler, 8, 3.0)
    theirs = by_diffusers(network, sampler, z, condition["text"], 3.0)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


def test_a_sampler_that_a_network_has_not_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="pair_sampler: pndm: tiny networks have heun alone"):
        sample_teacher(edm_mlp(), torch.zeros(1, 2, 3, 2), labels(1), "pndm", 4, 1.0)
