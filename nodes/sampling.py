"""DMD Model Sampling (a recipe on a MODEL) and DMD One-Step Sampler (the recipe, carried out)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..dmd_train.errors import UserError
from ..dmd_train.method.recipe import Recipe
from ..dmd_train.networks.published import RECIPES
from .conditioning import Conditioning
from .latents import empty_latent
from .model_recipe import family_of, recipe_of, sigmas_of, with_recipe
from .widgets import size_inputs

FROM_FILE, CUSTOM = "from the file", "custom timesteps"


def needed_recipe(model: ModelPatcher) -> Recipe:
    recipe = recipe_of(model)
    if recipe is None:
        raise UserError(
            "this MODEL does not say in how many steps it samples: put DMD Model Sampling before "
            "it and choose a recipe there"
        )
    return recipe


def dmd_sampler(recipe: Recipe) -> comfy.samplers.KSAMPLER:
    """x0, then noise again: fresh, which ComfyUI calls lcm, or its own. With one step, x0 itself.

    From sigma to sigma' euler goes to x0 + sigma' eps_hat, which is DDIM with eta = 0.
    """
    names = {"stochastic": "lcm", "deterministic": "euler"}
    return comfy.samplers.sampler_object(names[recipe.sampler])


class DMDModelSampling(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_ModelSampling",
            display_name="DMD Model Sampling",
            category="DMD One-Step",
            description="Say how a few-step MODEL must be sampled. Wire MODEL to a stock KSampler "
            "(its step count, cfg 1), or all three to SamplerCustom.",
            inputs=[
                io.Model.Input("model", tooltip="A few-step model from any loader."),
                io.Combo.Input(
                    "recipe",
                    options=[FROM_FILE, *RECIPES, CUSTOM],
                    default=FROM_FILE,
                    tooltip="From the file: what Load DMD Checkpoint or Load DMD LoRA read. "
                    "Otherwise the recipe that the model's author names.",
                ),
                io.String.Input(
                    "timesteps",
                    default="999",
                    tooltip="Only for custom timesteps: one network evaluation for each, noisiest "
                    "first, 0 to 999. Example: 999, 749, 499, 249.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="For a stock KSampler: lcm, simple, cfg 1 (euler for a deterministic "
                    "student of several steps). With one step nearly every sampler is exact; "
                    "uni_pc, dpm_fast and dpm_adaptive are not."
                ),
                io.Sampler.Output(tooltip="For SamplerCustom."),
                io.Sigmas.Output(tooltip="For SamplerCustom: the recipe's noise levels."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, recipe: str, timesteps: str) -> io.NodeOutput:
        if recipe == FROM_FILE:
            chosen = needed_recipe(model)
        elif recipe == CUSTOM:
            chosen = custom_recipe(model, timesteps)
        elif recipe in RECIPES:
            chosen = RECIPES[recipe]
        else:  # a workflow of another version; older ComfyUIs do not look into this list
            raise UserError(f"recipe: there is no '{recipe}'. Choose one of {', '.join(RECIPES)}")
        patched = with_recipe(model, chosen)
        return io.NodeOutput(patched, dmd_sampler(chosen), sigmas_of(patched, chosen))


def custom_recipe(model: ModelPatcher, timesteps: str) -> Recipe:
    """The user's own timesteps on a MODEL of a family with a discrete schedule."""
    family = family_of(model)
    try:
        chosen = tuple(int(t) for t in timesteps.replace(",", " ").split())
        return Recipe(family=family, prediction="eps", timesteps=chosen, noise_scale=1.0)
    except ValueError:  # pydantic's too
        raise UserError(
            f"timesteps: '{timesteps}' is no list of falling numbers from 999 to 0; "
            "write for example 999, 749, 499, 249"
        ) from None


@dataclass(frozen=True)
class StockSampler:
    """ComfyUI's KSampler, its widgets set."""

    steps: int
    cfg: float
    sampler_name: str
    scheduler: str

    def sample(
        self,
        model: ModelPatcher,
        noise: Tensor,
        positive: Conditioning,
        callback: Callable[..., None] | None = None,
        *,
        negative: Conditioning | None = None,
        seed: int,
    ) -> Tensor:
        """A LATENT's samples, like noise: N(0, I) in that MODEL's axes, from an empty latent.

        negative: not needed at cfg 1. seed: of the noise that the sampler itself adds.
        """
        samples: Tensor = comfy.sample.sample(
            model,
            noise,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            positive,
            negative or positive,  # at cfg 1 it is not evaluated
            torch.zeros_like(noise),
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )
        return samples


class ConditionalGuider(comfy.samplers.CFGGuider):
    """The positive condition alone: guidance is in a student's weights."""

    def set_conds(self, positive: Conditioning) -> None:
        self.inner_set_conds({"positive": positive})


def sample_by_recipe(
    model: ModelPatcher,
    noise: Tensor,
    positive: Conditioning,
    seed: int,
    callback: Callable[..., None],
    latent: Tensor | None = None,
    noise_mask: Tensor | None = None,
) -> Tensor:
    """A LATENT's samples, like noise: N(0, I) in the MODEL's axes, by its own recipe.

    latent: counts where noise_mask keeps it. seed: of the noise between steps.
    """
    recipe, guider = needed_recipe(model), ConditionalGuider(model)
    guider.set_conds(positive)
    samples: Tensor = guider.sample(
        noise,
        torch.zeros_like(noise) if latent is None else latent,
        dmd_sampler(recipe),
        sigmas_of(model, recipe),
        denoise_mask=noise_mask,
        callback=callback,
        disable_pbar=True,
        seed=seed,
    )
    return samples.to(comfy.model_management.intermediate_device())


class DMDOneStepSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_OneStepSampler",
            display_name="DMD One-Step Sampler",
            category="DMD One-Step",
            description="Sample a DMD model by its own recipe: one network call for a one-step "
            "model, and no more than its steps for the others. No cfg, no negative prompt.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load DMD Checkpoint, Load DMD LoRA or DMD Model Sampling.",
                ),
                io.Conditioning.Input("positive", tooltip="A prompt, or a class label."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The same seed gives the same noise as in KSampler.",
                ),
                *size_inputs(),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Instead of width, height and batch size. Its picture counts only "
                    "where a noise mask keeps it.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="For VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: Conditioning,
        seed: int,
        width: int,
        height: int,
        batch_size: int,
        latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        recipe = needed_recipe(model)
        given = latent or {"samples": empty_latent(model, width, height, batch_size)}
        samples = comfy.sample.fix_empty_latent_channels(model, given["samples"])
        if "noise_mask" not in given:
            samples = torch.zeros_like(samples)  # a student starts from noise alone
        noise = comfy.sample.prepare_noise(samples, seed, given.get("batch_index"))
        callback = latent_preview.prepare_callback(model, recipe.nfe)
        sampled = sample_by_recipe(
            model, noise, positive, seed, callback, samples, given.get("noise_mask")
        )
        return io.NodeOutput(given | {"samples": sampled})


class DMDEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_EmptyLatent",
            display_name="DMD Empty Latent",
            category="DMD One-Step",
            description="An empty latent of the right kind and size for this MODEL, for a stock "
            "KSampler. Needed for pixel models (digits, ImageNet-64), handy for the others.",
            inputs=[io.Model.Input("model", tooltip="The model that samples."), *size_inputs()],
            outputs=[io.Latent.Output(tooltip="For KSampler.")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, width: int, height: int, batch_size: int
    ) -> io.NodeOutput:
        return io.NodeOutput({"samples": empty_latent(model, width, height, batch_size)})
