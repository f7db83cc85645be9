"""What each objective gives a one-step student: the table of the papers, on data that we have.

python benchmarks/ablation.py digits --folder /tmp/ablation --seeds 0 1 2
python benchmarks/ablation.py digits --folder /tmp/ablation --rows all --set adversarial_weight=0.3
python benchmarks/ablation.py digits --folder /tmp/half --rows all --half

Each run has a folder of its own and goes on where it stopped; pairs are shared by the rows of a
seed. FD: Frechet distance in pixels of 2,000 samples with balanced classes, as `python -m dmd_train
evaluate` has it. Cost: network evaluations of training in thousands of samples, a forward 1, with
its backward 3, as far as the middle counted whole; pairs apart. --half: images are every second of
the data, FD is to these, and "held out" to the others.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmd_train.config import Config, make_config, parse_overrides
from dmd_train.data.conditions import Classes
from dmd_train.data.pictures import PictureBatch, class_rows
from dmd_train.distil import distil
from dmd_train.method.network import Network
from dmd_train.method.processes import Processes
from dmd_train.method.recipe import Recipe
from dmd_train.method.sample import draw
from dmd_train.method.seeding import generator, randn
from dmd_train.networks.load import load, load_teacher
from dmd_train.prepare import carried_out, make_conditions, make_run_pairs, pictures_of, prepare
from dmd_train.run.folder import RunFolder
from dmd_train.run.metrics import CHUNK, SAMPLES, frechet_distance, intra_class_std_ratio

SETS: dict[str, dict[str, Any]] = {
    "digits": {"teacher": "digits", "images": "digits", "preset": "digits-one-step"},
}
"""Data set -> its teacher, its images and its preset; what else differs of its runs."""

ROWS: dict[str, dict[str, Any]] = {
    "regression": {"images": None, "only": "pairs"},
    "matching": {"images": None, "regression_weight": 0},
    "both": {"images": None},
    "matching-gan": {"regression_weight": 0},
    "all": {},
}
"""Row -> what it changes; "only": nothing but regression, for as many updates."""


class Numbers(NamedTuple):
    """Of one sampler. held_out: NaN without --half."""

    to_data: float
    held_out: float
    to_teacher: float
    diversity: float


def samples_of(network: Network, recipe: Recipe | None) -> tuple[Tensor, Tensor]:
    """Images (SAMPLES, C, H, W) as `evaluate` draws them with seed 0, and their labels."""
    assert network.classes
    classes, cpu = Classes(network.classes), torch.device("cpu")
    labels = classes.balanced(CHUNK)
    images = []
    for number in range(SAMPLES // CHUNK):
        z = randn((CHUNK, *network.shape), generator(cpu, 0, "measure", number))
        images.append(draw(network, recipe, [z], classes.take(labels, cpu)).clamp(-1, 1))
    return torch.cat(images), labels.repeat(len(images))


def cost(config: Config, is_regression_alone: bool) -> float:
    """Network evaluations of the run's training, in thousands."""
    regression = 3 * config.pair_batch_size if config.needs_pairs else 0
    if is_regression_alone:
        return config.steps * regression / 1000
    batch, updates = config.batch_size, config.critic_updates
    guided = 1 if config.guidance == 1 else 2
    matching = batch * (3 + guided + 1) + updates * 3 * batch + (updates - 1) * batch
    adversarial = 3 * batch + updates * 6 * batch if config.images else 0
    return config.steps * (regression + matching + adversarial) / 1000


def config_of(name: str, row: str, seed: int, folder: Path, changes: dict[str, Any]) -> Config:
    values = SETS[name] | ROWS[row] | changes
    if ROWS[row].get("images", "") is None:
        values["images"] = None
    only = values.pop("only", None)
    values |= {"seed": seed, "output": folder / f"{row}-{seed}", "device": "cpu"}
    config = make_config({k: v for k, v in values.items() if v is not None}, "ablation")
    return config.model_copy(update={"regression_warmup_steps": config.steps}) if only else config


def train(config: Config, paired: Config, real: PictureBatch) -> None:
    """The run to its end. paired: of a run whose pairs every row of the seed has."""
    torch.set_num_threads(1)
    loaded = load_teacher(config, torch.device("cpu"))
    pairs = None
    if config.needs_pairs:
        with RunFolder(paired) as common:
            one = Processes(torch.device("cpu"))
            known = carried_out(make_conditions(common, loaded, one), lambda _: None)
            pairs = carried_out(make_run_pairs(common, loaded, known, one), lambda _: None)
    with RunFolder(config) as run:
        if run.finished:
            return
        ready = carried_out(prepare(run, loaded, pairs=pairs, real=real), lambda _: None)
        for _ in distil(ready):
            pass


def measured(
    name: str, arguments: argparse.Namespace
) -> Iterator[tuple[str, float, list[Numbers]]]:
    """Row, cost and its numbers by seed, the teacher's first."""
    changes = parse_overrides(arguments.set)
    first = config_of(name, "all", 0, arguments.folder, changes)
    loaded = load_teacher(first, torch.device("cpu"))
    network = loaded.network
    assert network.classes
    pictures = pictures_of(first, network)
    channels, height, width = network.shape
    data = torch.stack([pictures.read(i, height, width, channels) for i in range(len(pictures))])
    assert pictures.captions
    labels = class_rows(pictures.captions, network.classes, name)
    seen = slice(0, None, 2) if arguments.half else slice(None)
    others = slice(1, None, 2) if arguments.half else slice(0, 0)
    real = PictureBatch(data[seen], pictures.captions[seen])

    teacher_images, _ = samples_of(network, None)

    def numbers(images: Tensor, of: Tensor) -> Numbers:
        return Numbers(
            frechet_distance(images, data[seen]),
            frechet_distance(images, data[others]) if arguments.half else float("nan"),
            frechet_distance(images, teacher_images),
            intra_class_std_ratio(images, of, data, labels),
        )

    yield "teacher", 0.0, [numbers(*samples_of(network, None))]
    for row in arguments.rows:
        found = []
        for seed in arguments.seeds:
            config = config_of(name, row, seed, arguments.folder, changes)
            both = config_of(name, "both", seed, arguments.folder, changes)
            shared = arguments.folder / f"pairs-{seed}"
            train(config, both.model_copy(update={"output": shared}), real)
            student = load(str(config.output / "student.safetensors"), torch.device("cpu"))
            found.append(numbers(*samples_of(student.network, student.recipe)))
            print(json.dumps({"row": row, "seed": seed, **found[-1]._asdict()}), flush=True)
        yield row, cost(config, "only" in ROWS[row]), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SETS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--half", action="store_true")
    arguments = parser.parse_args()
    lines = ["| | FD to data | held out | FD to teacher | diversity | cost |", "| --- " * 6 + "|"]
    for row, spent, found in measured(arguments.name, arguments):
        means = [statistics.mean(values) for values in zip(*found, strict=True)]
        told = " | ".join(f"{value:.3f}" for value in means)
        lines.append(f"| {row} | {told} | {spent:.0f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
