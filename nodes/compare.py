"""DMD Compare: teacher and student on the same noise, side by side, with what a picture cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.sample
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io, ui
from torch import Tensor

from ..dmd_train.errors import UserError
from ..dmd_train.run.pixels import COLUMNS, grid, stack
from .canvas_network import call_of
from .conditioning import Conditioning, rows_of
from .latents import as_pictures, decoded, empty_latent, preview_colours
from .model_recipe import family_of
from .progress import EVERY, Progress, say
from .sampling import StockSampler, needed_recipe, sample_by_recipe
from .widgets import cfg_input, sampler_inputs, side_inputs, steps_input

PICTURE_SIZE = 128
"""Smaller pictures are enlarged, by a whole factor, to at least this many pixels."""


class DMDCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_Compare",
            display_name="DMD Compare",
            category="DMD One-Step",
            description="Teacher and student side by side, each pair from the same noise and "
            "condition, with the network evaluations (NFE) and the seconds an image of this run.",
            inputs=[
                io.Model.Input("teacher", tooltip="The many-step model that the student is of."),
                io.Model.Input(
                    "student",
                    tooltip="From DMD Distill, Load DMD Checkpoint, Load DMD LoRA or DMD Model "
                    "Sampling: it is sampled by its own recipe.",
                ),
                io.Conditioning.Input(
                    "conditions",
                    tooltip="Prompts (several joined by Conditioning (Combine)) or class labels: "
                    "picture i gets condition i, round and round.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The same seed gives the same noise as in KSampler, for both rows.",
                ),
                io.Int.Input(
                    "count",
                    default=0,
                    min=0,
                    max=100,
                    tooltip=f"Pictures of each model. 0: one a condition, at most {COLUMNS}.",
                ),
                steps_input(
                    "teacher_steps", 1000, "Of the teacher; the student has its own number."
                ),
                cfg_input(
                    1.0,
                    "Of the teacher. 1: no guidance, half the evaluations, no negative needed. The "
                    "student has its guidance in its weights.",
                ),
                *sampler_inputs("Of the teacher. heun for the digits.", "Of the teacher."),
                *side_inputs(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Of the teacher, where cfg is above 1: an empty prompt, or DMD Class "
                    "Label with no class.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Without it: the latents' preview colours; of a model that draws "
                    "pixels, the picture itself.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="One sheet: the teacher's pictures above the student's.")
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        teacher: ModelPatcher,
        student: ModelPatcher,
        conditions: Conditioning,
        seed: int,
        count: int,
        teacher_steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        width: int,
        height: int,
        negative: Conditioning | None = None,
        vae: VAE | None = None,
    ) -> io.NodeOutput:
        recipe = needed_recipe(student)
        require_alike(teacher, student)
        if cfg != 1 and negative is None:
            raise UserError(
                f"cfg: {cfg:g} is guidance away from a negative prompt, and there is none: wire "
                "negative, or set cfg to 1"
            )
        prompts = [[row] for row in rows_of(conditions)]
        count = count or min(len(prompts), COLUMNS)
        empty = empty_latent(student, width, height, count)
        empty = comfy.sample.fix_empty_latent_channels(student, empty)
        noise = comfy.sample.prepare_noise(empty, seed)
        by_teacher = StockSampler(teacher_steps, cfg, sampler_name, scheduler)
        rows = (
            measured(
                Progress("teacher's step", count * teacher_steps, cls.hidden.unique_id),
                Counted(teacher),
                partial(one_evaluation(cfg).sample, negative=negative, seed=seed),
                partial(by_teacher.sample, negative=negative, seed=seed),
                noise,
                prompts,
            ),
            measured(
                Progress("student's step", count * recipe.nfe, cls.hidden.unique_id),
                Counted(student),
                partial(one_evaluation(1.0).sample, seed=seed),
                partial(sample_by_recipe, seed=seed),
                noise,
                prompts,
            ),
        )
        settings = f"{sampler_name}, {scheduler}, {teacher_steps} steps, cfg {cfg:g}"
        captions = (
            f"teacher: {rows[0].cost} ({settings})",
            f"student: {rows[1].cost}, {how_much_faster(rows[0].seconds / rows[1].seconds)}",
        )
        if vae:
            say("decoding", cls.hidden.unique_id)
        latents = torch.cat([row.latents for row in rows])
        images = decoded(vae, latents) if vae else previewed(latents, student)
        grids = [grid(row, min(count, COLUMNS), PICTURE_SIZE) for row in images.split(count)]
        sheet = stack(list(zip(captions, grids, strict=True)))
        image = torch.from_numpy(np.array(sheet))[None] / 255
        shown = ui.PreviewImage(image, cls=cls).as_dict() | {"text": captions}
        return io.NodeOutput(image, ui=shown)


def require_alike(teacher: ModelPatcher, student: ModelPatcher) -> None:
    """Raises UserError unless both draw latents of one kind, which the same noise starts."""
    formats = [model.get_model_object("latent_format") for model in (teacher, student)]
    kinds = [f"{type(kind).__name__}, {kind.latent_channels} channels" for kind in formats]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"teacher and student draw different latents ({kinds[0]}; {kinds[1]}): wire a student "
            "and a teacher of the same family"
        )


def one_evaluation(cfg: float) -> StockSampler:
    """The shortest that has a MODEL loaded and compiled. cfg: as in what is measured."""
    return StockSampler(1, cfg, "euler", "simple")


@dataclass(frozen=True)
class Row:
    """A model's pictures, as LATENTs are, and what each took in the mean."""

    latents: Tensor
    nfe: float
    seconds: float

    @property
    def cost(self) -> str:
        return f"{self.nfe:g} NFE, {self.seconds:.4g} s an image"


Draw = Callable[..., Tensor]
"""(model, noise, positive, callback) -> latent, like noise."""


def measured(
    progress: Progress,
    model: "Counted",
    warm_up: Draw,
    draw: Draw,
    noise: Tensor,
    prompts: list[Conditioning],
) -> Row:
    """One picture at a time; `warm_up` has the model loaded and compiled before the clock runs.

    noise: a LATENT's, one start a picture.
    """
    warm_up(model.patcher, noise[:1], prompts[0], None)
    model.evaluations, latents, seconds = 0, [], 0.0
    steps = progress.total // len(noise)
    for i, start in enumerate(noise.split(1)):
        callback = partial(tell_now_and_then, progress, i * steps)
        since = time.perf_counter()
        latent = draw(model.patcher, start, prompts[i % len(prompts)], callback=callback)
        latents.append(latent.cpu())  # waits for the device
        seconds += time.perf_counter() - since
        progress.update((i + 1) * steps)
    return Row(torch.cat(latents), model.evaluations / len(noise), seconds / len(noise))


def tell_now_and_then(progress: Progress, before: int, step: int, *_: object) -> None:
    """A sampler's callback. Every step would cost a small network time that is not its own."""
    if time.monotonic() - progress.said >= EVERY:
        progress.update(min(before + step + 1, progress.total))


class Counted:
    """A clone of a MODEL that counts how many inputs its network is evaluated on.

    A batch of a picture's prompt and negative prompt is two evaluations.
    """

    def __init__(self, model: ModelPatcher) -> None:
        self.evaluations = 0
        self.patcher = model.clone()
        call = call_of(model)

        def evaluate(network: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
            self.evaluations += len(arguments["input"])
            return call(network, arguments)

        self.patcher.set_model_unet_function_wrapper(evaluate)


def how_much_faster(ratio: float) -> str:
    return f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"


def previewed(latents: Tensor, model: ModelPatcher) -> Tensor:
    """LATENTs -> the colours (N, 3, h, w) in [-1, 1] that ComfyUI previews them in."""
    latent_format = model.get_model_object("latent_format")
    colours = preview_colours(latent_format, as_pictures(latent_format.process_in(latents)))
    if colours is None:
        raise UserError(
            f"vae: the latents of this model ({family_of(model)}) have no preview colours: wire "
            "its VAE"
        )
    levels = ((colours + 1) / 2 * 255).byte()  # rounded down, as ComfyUI's previews are
    return levels / 127.5 - 1
