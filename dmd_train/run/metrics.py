"""Numbers of a sampler: distance to the data, diversity, milliseconds an image."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ..data.conditions import Classes
from ..files.write import write_text
from ..method.network import Network
from ..method.recipe import Recipe
from ..method.sample import HEUN_STEPS, draw
from ..method.seeding import generator, randn
from ..networks.digits import Labelled, digits

SAMPLES = 2000
CHUNK = 500
MEASURE_STAGES = SAMPLES // CHUNK + 1
HEUN_NFE = 2 * HEUN_STEPS - 1


class Progressed(Protocol):
    def __call__(self, *, completed: int) -> None: ...


@dataclass(frozen=True)
class SamplerNumbers:
    """What summary.json says of one sampler."""

    nfe: int
    frechet_distance: float
    intra_class_std_ratio: float
    ms_per_image_batch_1: float
    ms_per_image_batch_64: float


class Pixels(nn.Flatten):
    """The identity as a feature extractor: (N, C, H, W) -> (N, num_features)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(samples: Tensor, data: Tensor) -> float:
    """Between Gaussians fitted to the pixels in float64: |m1-m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2).

    samples, data: (N, C, H, W) in [-1, 1].
    """
    distance = FrechetInceptionDistance(Pixels(data[0].numel())).set_dtype(torch.float64)
    distance.update(data.double(), real=True)
    distance.update(samples.double(), real=False)
    return float(distance.compute())


def intra_class_std_ratio(
    samples: Tensor, labels: Tensor, data: Tensor, data_labels: Tensor
) -> float:
    """Mean over classes of the samples' pixel std, over the data's. 1 = as diverse; 0 = collapsed.

    A class's pixel std is the mean over pixels of the standard deviation within the class.
    """

    def spread(images: Tensor, of: Tensor) -> Tensor:
        return torch.stack([images[of == label].std(dim=0).mean() for label in of.unique()]).mean()

    return float(spread(samples, labels) / spread(data, data_labels))


def ms_per_image(sample: Callable[[int], Tensor], batch: int, repeats: int) -> float:
    """Median wall-clock milliseconds an image of `sample(batch)`, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        images = sample(batch)
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:]) / batch


def measure_digits(
    network: Network, recipe: Recipe | None, seed: int, progress: Progressed
) -> SamplerNumbers:
    """A digits sampler's numbers on SAMPLES fresh images with balanced classes.

    Images are clamped to [-1, 1], as a viewer does. `progress` is told the stages
    completed, of MEASURE_STAGES.
    """
    assert network.classes
    classes, device = Classes(network.classes), network.device
    nfe = recipe.nfe if recipe else HEUN_NFE

    def fresh(batch: int, number: int) -> Tensor:
        gen = generator(device, seed, "measure", number)
        noise = [randn((batch, *network.shape), gen) for _ in range(recipe.nfe if recipe else 1)]
        condition = classes.take(classes.balanced(batch), device)
        return draw(network, recipe, noise, condition).clamp(-1, 1)

    images = []
    for number in range(SAMPLES // CHUNK):
        images.append(fresh(CHUNK, number))
        progress(completed=number + 1)
    samples = torch.cat(images)
    labels = classes.balanced(CHUNK).to(device).repeat(len(images))
    data = Labelled(*(part.to(device) for part in digits()))
    numbers = SamplerNumbers(
        nfe=nfe,
        frechet_distance=frechet_distance(samples, data.image),
        intra_class_std_ratio=intra_class_std_ratio(samples, labels, data.image, data.label),
        ms_per_image_batch_1=ms_per_image(lambda batch: fresh(batch, -1), batch=1, repeats=20),
        ms_per_image_batch_64=ms_per_image(lambda batch: fresh(batch, -1), batch=64, repeats=10),
    )
    progress(completed=MEASURE_STAGES)
    return numbers


def summary(teacher: SamplerNumbers, student: SamplerNumbers) -> dict[str, Any]:
    """What summary.json holds."""
    return {
        "teacher": asdict(teacher),
        "student": asdict(student),
        "speedup_batch_1": teacher.ms_per_image_batch_1 / student.ms_per_image_batch_1,
        "speedup_batch_64": teacher.ms_per_image_batch_64 / student.ms_per_image_batch_64,
    }


def save_summary(path: Path, numbers: dict[str, Any]) -> None:
    write_text(path, json.dumps(numbers, indent=2) + "\n")
