"""DMD Teacher Pairs: noise and the image that the MODEL makes of it, by a sampler of ComfyUI's."""

import json
from dataclasses import astuple, dataclass
from pathlib import Path

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..dmd_train.data.conditions import Classes
from ..dmd_train.data.pairs import Sample, make_pairs
from ..dmd_train.errors import UserError
from ..dmd_train.files.write import sole_writer
from ..dmd_train.method.seeding import stream_seed
from .conditioning import Conditioning, Row, fingerprint, joined, rows_of
from .fingerprint import digest, model_fingerprint
from .latents import as_latent, as_pictures, empty_latent, require_pictures
from .progress import Progress, say
from .run_folders import pairs_path
from .sampling import StockSampler
from .widgets import PAIRS, cfg_input, sampler_inputs, side_inputs, steps_input


@dataclass(frozen=True)
class TeacherPairs:
    """What DMD Distill is told of pairs, so that it refuses those of something else.

    folder: `Pairs(Shards(folder))`, whose rows count those of the conditioning. conditions: its
    fingerprint. shape: (C, H, W).
    """

    folder: Path
    conditions: str
    shape: tuple[int, int, int]
    count: int


@dataclass(frozen=True)
class Teacher:
    """A MODEL and how it is sampled. Called, it is the `Sample` of `make_pairs`."""

    model: ModelPatcher
    rows: list[Row]
    negative: list[Row]
    seed: int
    how: StockSampler

    def __call__(self, noise: Tensor, numbers: Tensor, first: int) -> Tensor:
        """noise: (N, C, H, W) ~ N(0, I), numbers: (N,) of rows -> x0 in the MODEL's own scale."""
        positive = joined([self.rows[number] for number in numbers.tolist()])
        if positive is None:
            singles = enumerate(zip(noise.split(1), numbers.split(1), strict=True), first)
            return torch.cat([self(z, number, i) for i, (z, number) in singles])
        latent_format = self.model.get_model_object("latent_format")
        latent = self.how.sample(
            self.model,
            as_latent(latent_format, noise),
            positive,
            lambda *_: comfy.model_management.throw_exception_if_processing_interrupted(),
            negative=self.negative,
            seed=stream_seed(self.seed, "pair sampler", first),
        )
        x0: Tensor = latent_format.process_in(latent.float())
        return as_pictures(x0).cpu()

    def origin(self, shape: tuple[int, int, int]) -> str:
        """A name of everything that a pair is a function of, but its number."""
        told = [model_fingerprint(self.model), fingerprint(self.rows), fingerprint(self.negative)]
        return json.dumps([*told, self.seed, *astuple(self.how), *shape])


class DMDTeacherPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD_TeacherPairs",
            display_name="DMD Teacher Pairs",
            category="DMD One-Step",
            description="Pictures by the many-step MODEL and the noise each was made from, for the "
            "regression of DMD Distill. Stop whenever you like: finished files are kept.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The many-step model that is distilled."),
                io.Conditioning.Input(
                    "conditions", tooltip="The same that go into DMD Distill: DMD Prompts, ..."
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Of the folder in output/dmd_pairs. Empty: named after the settings, "
                    "so that the same settings go on and others begin anew.",
                ),
                io.Int.Input(
                    "count",
                    default=500,
                    min=1,
                    max=10**7,
                    tooltip="How many pairs. A larger number later adds to those that are there.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Of the noise and the choice of conditions.",
                ),
                steps_input("steps", 10000, "Of the sampler, as in KSampler."),
                cfg_input(0.0, "Guidance, which the student learns as its own. 1: none."),
                *sampler_inputs(
                    "One that adds no noise: not an ancestral or sde one, nor lcm.",
                    "Of the noise levels, as in KSampler.",
                ),
                *side_inputs(),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=4096,
                    tooltip="Pictures at once. It changes time and memory alone.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="DMD Prompts' negative. Needed where cfg is not 1.",
                ),
            ],
            outputs=[
                PAIRS.Output(
                    display_name="pairs", tooltip="For DMD Distill with the same conditions."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        conditions: Conditioning,
        name: str,
        count: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        width: int,
        height: int,
        batch_size: int,
        negative: Conditioning | None = None,
    ) -> io.NodeOutput:
        rows = rows_of(conditions)
        against = _negative(negative, cfg)
        how = StockSampler(steps, cfg, sampler_name, scheduler)
        teacher = Teacher(model, rows, against, seed, how)
        require_pictures(model)
        _, channels, high, wide = as_pictures(empty_latent(model, width, height, 1)).shape
        shape = (channels, high, wide)
        origin = teacher.origin(shape)
        folder = pairs_path(name.strip() or digest(origin)[:8])
        node_id = str(cls.hidden.unique_id)
        sample, choice = _shown(teacher, count, node_id), Classes(len(rows))
        kept = 0
        try:
            with sole_writer(folder):
                made = make_pairs(folder, count, seed, shape, choice, batch_size, origin, sample)
                for done in made:
                    kept = done
        except comfy.model_management.InterruptProcessingException:
            say(f"{kept} of {count} pairs kept; the same settings go on from there", node_id)
            raise
        pairs = TeacherPairs(folder, fingerprint(rows), shape, count)
        line = f"{count} pairs of {len(rows)} conditions in output/dmd_pairs/{folder.name}"
        return io.NodeOutput(pairs, ui={"text": (line,)})


def _negative(negative: Conditioning | None, cfg: float) -> list[Row]:
    """The one condition that guidance leads away from; none where there is no guidance."""
    if cfg == 1:
        return []
    rows = rows_of(negative or [])
    if len(rows) != 1:
        told = f"{len(rows)} conditions are" if rows else "nothing is"
        raise UserError(
            f"negative: {told} wired, cfg {cfg:g} needs one. Wire DMD Prompts' negative, or set "
            "cfg: 1."
        )
    return rows


def _shown(sample: Sample, count: int, node_id: str) -> Sample:
    """The same sampling with a bar, which begins at the first pair that is not there yet."""
    progress: list[Progress] = []

    def shown(noise: Tensor, rows: Tensor, first: int) -> Tensor:
        if not progress:
            progress.append(Progress("pairs", count, node_id, done=first))
        images = sample(noise, rows, first)
        progress[0].update(first + len(noise))
        return images

    return shown
