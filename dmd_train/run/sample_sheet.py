"""A run's pictures: teacher, student and the gradient between them, on the same noise."""

from collections.abc import Iterator
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from ..config import Config
from ..data.conditions import Conditions
from ..method.network import Network
from ..method.objectives import DistributionMatching
from ..method.recipe import Recipe
from ..method.sample import sample_student, sample_teacher, step_noise
from .pixels import COLUMNS, GAP, grid, stack

LARGE, FEW = 1 << 13, 4
"""From so many values a sample is large, and a sheet shows only a few."""

GRADIENT_TIMESTEP = 500


class SampleSheet:
    """Pictures of `count` rows of the conditions, at most FEW where they are large."""

    def __init__(
        self,
        teacher: Network,
        recipe: Recipe,
        conditions: Conditions,
        config: Config,
        count: int = COLUMNS,
    ) -> None:
        self.teacher, self.recipe, self.config = teacher, recipe, config
        self.count = count if torch.Size(teacher.shape).numel() < LARGE else FEW
        device = teacher.device
        noise = step_noise(teacher.shape, self.count, config.seed, recipe.nfe, device)
        rows = conditions.balanced(self.count)
        # one picture at a time where they are large: this is a look aside, not worth its memory
        size = self.count if self.count == count else 1
        self.parts = [
            ([z.split(size)[i] for z in noise], conditions.take(row, device))
            for i, row in enumerate(rows.split(size))
        ]
        self.drawn: list[Tensor] = []

    def __len__(self) -> int:
        """Parts, each drawn at a time."""
        return len(self.parts)

    def draw_teacher(self) -> Iterator[int]:
        """The teacher's row, which does not change: once, before the first `draw`.

        Yields the parts done.
        """
        config = self.config
        for z, condition in self.parts:
            x0 = sample_teacher(
                self.teacher,
                z[0],
                condition,
                config.pair_sampler,
                config.pair_steps,
                config.guidance,
            )
            self.drawn.append(self.teacher.to_images(x0).float().cpu())
            yield len(self.drawn)

    @torch.no_grad()
    def draw(self, student: Network, matching: DistributionMatching | None = None) -> Image.Image:
        """matching: adds a row with its gradient g at t = 500, each scaled to its own maximum."""
        samples = [
            sample_student(student, self.recipe, condition, z) for z, condition in self.parts
        ]
        images = [student.to_images(x).float().cpu() for x in samples]
        rows = [
            self._teacher_row,
            (f"student, {self.recipe.nfe} NFE", self._grid(images)),
        ]
        if matching:
            gradients = []
            for x, (z, condition) in zip(samples, self.parts, strict=True):
                t = torch.full((len(x),), GRADIENT_TIMESTEP, device=x.device)
                g = matching.gradient(x, condition, t, z[0])[:, :3]
                g = g[:, :1] if g.shape[1] == 2 else g
                gradients.append(g / g.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12))
            size = rows[1][1].width // min(self.count, COLUMNS) - 2 * GAP
            picture = grid(torch.cat(gradients), min(self.count, COLUMNS), size)
            rows.append((f"distribution matching gradient, t = {GRADIENT_TIMESTEP}", picture))
        return stack(rows)

    @cached_property
    def _teacher_row(self) -> tuple[str, Image.Image]:
        steps = self.config.pair_steps
        nfe = 2 * steps - 1 if self.config.pair_sampler == "heun" else steps
        nfe *= 1 if self.config.guidance == 1 else 2
        return f"teacher, {nfe} NFE", self._grid(self.drawn)

    def _grid(self, images: list[Tensor]) -> Image.Image:
        return grid(torch.cat(images), min(self.count, COLUMNS))
