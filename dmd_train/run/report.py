"""Pictures and tables of a run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table
from torch import Tensor

from ..config import Config
from ..data.conditions import Conditions
from ..files.write import write_atomically, write_text
from ..method.network import Network
from ..method.objectives import DistributionMatching
from ..method.recipe import Recipe
from ..method.sample import sample_student, sample_teacher, step_noise
from .pixels import COLUMNS, GAP, grid, stack

if TYPE_CHECKING:
    from .metrics import SamplerNumbers

LARGE, FEW = 1 << 13, 4
"""From so many values a sample is large, and a sheet shows only a few."""

GRADIENT_TIMESTEP = 500


def save_picture(path: Path, image: Image.Image) -> None:
    """PNG, atomically."""
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


class SampleSheet:
    """Teacher, student and the gradient between them, on the same noise and conditions."""

    def __init__(
        self,
        teacher: Network,
        recipe: Recipe,
        conditions: Conditions,
        config: Config,
        count: int = COLUMNS,
    ) -> None:
        self.recipe, self.device = recipe, teacher.device
        self.count = count if torch.Size(teacher.shape).numel() < LARGE else FEW
        noise = step_noise(teacher.shape, self.count, config.seed, recipe.nfe, self.device)
        rows = conditions.balanced(self.count)
        # one picture at a time where they are large: this is a look aside, not worth its memory
        size = self.count if self.count == count else 1
        self.parts = [
            ([z.split(size)[i] for z in noise], conditions.take(row, self.device))
            for i, row in enumerate(rows.split(size))
        ]
        steps, sampler = config.pair_steps, config.pair_sampler
        images = [
            sample_teacher(teacher, z[0], condition, sampler, steps, config.guidance)
            for z, condition in self.parts
        ]
        nfe = 2 * steps - 1 if sampler == "heun" else steps
        nfe *= 1 if config.guidance == 1 else 2
        self.teacher = (f"teacher, {nfe} NFE", self._grid(teacher, images))

    @torch.no_grad()
    def draw(self, student: Network, matching: DistributionMatching | None = None) -> Image.Image:
        """matching: adds a row with its gradient g at t = 500, each scaled to its own maximum."""
        samples = [
            sample_student(student, self.recipe, condition, z) for z, condition in self.parts
        ]
        rows = [
            self.teacher,
            (f"student, {self.recipe.nfe} NFE", self._grid(student, samples)),
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

    def _grid(self, network: Network, samples: list[Tensor]) -> Image.Image:
        images = torch.cat([network.to_images(x).float().cpu() for x in samples])
        return grid(images, min(self.count, COLUMNS))


def save_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """A panel for each value of metrics.jsonl, over student updates."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if name not in ("step", "seconds")]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        told = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*told, strict=True), linewidth=0.8)
        axis.set(title=name.replace("/", ": ").replace("_", " "), xlabel="student updates")
        axis.set_yscale("log")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def summary(teacher: "SamplerNumbers", student: "SamplerNumbers") -> dict[str, Any]:
    """What summary.json holds."""
    return {
        "teacher": asdict(teacher),
        "student": asdict(student),
        "speedup_batch_1": teacher.ms_per_image_batch_1 / student.ms_per_image_batch_1,
        "speedup_batch_64": teacher.ms_per_image_batch_64 / student.ms_per_image_batch_64,
    }


def save_summary(path: Path, numbers: dict[str, Any]) -> None:
    write_text(path, json.dumps(numbers, indent=2) + "\n")


def numbers_table(columns: "dict[str, SamplerNumbers]") -> Table:
    """Samplers beside each other, for the terminal; two get a column of speed-up."""
    table = Table(title="2,000 fresh samples, balanced classes")
    table.add_column("")
    for name, numbers in columns.items():
        table.add_column(f"{name} ({numbers.nfe} NFE)", justify="right")
    if len(columns) > 1:
        table.add_column("speed-up", justify="right")
    lines = [
        ("Fréchet distance to the data", "frechet_distance", "{:.3f}"),
        ("intra-class std ratio", "intra_class_std_ratio", "{:.3f}"),
        ("ms an image, batch 1", "ms_per_image_batch_1", "{:.3f}"),
        ("ms an image, batch 64", "ms_per_image_batch_64", "{:.4f}"),
    ]
    for title, key, form in lines:
        values = [getattr(numbers, key) for numbers in columns.values()]
        cells = [form.format(value) for value in values]
        if len(values) > 1:
            cells.append(f"{values[0] / values[1]:.1f}x" if key.startswith("ms") else "")
        table.add_row(title, *cells)
    return table
