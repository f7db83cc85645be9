"""The commands of `python -m dmd_train`. They only iterate what the engine yields."""

import shlex
import signal
import sys
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, NoReturn

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from . import networks
from .checkpoint import RunFolder
from .conditions import Classes
from .config import DIGITS, Config, load_config, make_config, parse_overrides
from .distil import LOG_EVERY, StepReport, distil
from .errors import UserError
from .files import write_atomically
from .networks import Loaded
from .networks.edm import EDMNetwork
from .pairs import load_pairs, make_pairs
from .report import SampleSheet, grid, picture, save_curves, save_picture
from .sample import draw, step_noise
from .student import one_step_recipe

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a diffusion model into a generator that needs ONE network evaluation (DMD).",
)
teacher_app = typer.Typer(no_args_is_help=True, help="Train an embedded teacher from scratch.")
app.add_typer(teacher_app, name="teacher")

console = Console()

PYTHON = ".venv/bin/python" if Path(".venv/bin/python").exists() else "python"
"""How the next command to type begins, in this folder."""

SETTINGS = "Settings: " + "; ".join(
    f"{name} ({field.description})" if field.description else name
    for name, field in Config.model_fields.items()
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; may be repeated."),
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A student, or a teacher.")]


class StopRequest:
    """Ctrl-C and SIGTERM become a flag, looked at between two steps. A second one kills."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, self._before[self.signal])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def bar() -> Progress:
    """A progress bar with counts, time so far and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@app.command(epilog=SETTINGS)
def demo(set_: SetOption = None) -> None:
    """Distil the embedded teacher to one step and measure it: the whole job, in minutes."""
    settings = {"teacher": DIGITS, "preset": "digits-one-step", "output": str(_demo_folder())}
    config = make_config(settings | parse_overrides(set_ or []), "demo")
    with RunFolder(config) as run:
        _train(run, again=f"{PYTHON} -m dmd_train demo")
        student = networks.load(str(run.student), config.device_object())
        _evaluate(student, config.seed, run)
        save_picture(run.path / "contact-sheet.png", _contact_sheet(student, run))
        console.print(f"{run.path}/:", *(path.name for path in sorted(run.path.glob("[!.]*"))))
        console.print("Next:")
        console.print(_sample_command(run.student), soft_wrap=True)


@app.command(epilog=SETTINGS)
def train(
    run_yaml: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The settings of the run.")],
    set_: SetOption = None,
) -> None:
    """Distil a teacher, or go on with a run that was stopped.

    Ctrl-C saves a checkpoint and the student so far; the same command goes on from there.
    """
    config = load_config(run_yaml, set_ or [])
    with RunFolder(config) as run:
        if run.finished:
            console.print(f"{run.path}: finished before, at step {config.steps}: {run.student}")
            return
        again = [PYTHON, "-m", "dmd_train", "train", str(run_yaml)]
        _train(run, shlex.join(again + [part for value in set_ or [] for part in ("--set", value)]))
        console.print(f"{run.path}: finished. Next:")
        console.print(_sample_command(run.student), soft_wrap=True)


@app.command()
def sample(
    file: FileArgument,
    out: Annotated[
        Path, typer.Option(help="A .png (one sheet), a .npy, or a folder (one PNG an image).")
    ],
    class_: Annotated[
        int | None, typer.Option("--class", help="The class label; left out: all, balanced.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same pictures.")] = 0,
) -> None:
    """Draw images from a file, in as many steps as the file itself says.

    A .npy holds (N, C, H, W) float32 in [-1, 1].
    """
    if out.suffix not in (".png", ".npy", ""):
        raise UserError(f"--out {out}: give a .png, a .npy or a folder.")
    loaded = networks.load(str(file), torch.device("cpu"))
    network = loaded.network
    if class_ is None:
        condition = Classes(network.classes).balanced(count, network.device)
    elif 0 <= class_ < network.classes:
        condition = {"label": torch.full((count,), class_)}
    else:
        raise UserError(f"--class {class_}: {file} knows the classes 0 to {network.classes - 1}.")
    nfe = loaded.recipe.nfe if loaded.recipe else 1
    noise = step_noise(network.shape, count, seed, nfe, network.device)
    images = draw(network, loaded.recipe, noise, condition).clamp(-1, 1)
    match out.suffix:
        case ".npy":
            write_atomically(out, lambda temporary: np.save(temporary, images.numpy()))
        case ".png":
            save_picture(out, grid(images, columns=min(count, 8)))
        case _:
            for i, image in enumerate(images):
                save_picture(out / f"{i:05d}.png", picture(image))
    console.print(str(out), soft_wrap=True)


@app.command()
def evaluate(
    file: FileArgument,
    seed: Annotated[int, typer.Option(min=0, help="Of the fresh samples.")] = 0,
) -> None:
    """Measure a file on 2,000 fresh samples: distance to the data, diversity, speed."""
    _evaluate(networks.load(str(file), torch.device("cpu")), seed)


@teacher_app.command()
def digits(
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 12000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train the digits teacher from scratch. The same seed gives the same weights."""
    from .networks.digits import digits_network, train_digits_teacher

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    teacher = digits_network()
    with bar() as progress:
        task = progress.add_task("teacher", total=steps, note="")
        for step in train_digits_teacher(teacher, steps, seed):
            progress.update(task, completed=step)
    networks.save(out, teacher)
    console.print(str(out), soft_wrap=True)


def _train(run: RunFolder, again: str) -> None:
    """Bring a run to its end, or exit with the signal's code once a stop has been saved."""
    config = run.config
    device = config.device_object()
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    loaded = networks.load(config.teacher, device)
    classes = Classes(loaded.network.classes)
    recipe = one_step_recipe(loaded, config)
    with StopRequest() as stop:
        pairs = None
        if config.regression_weight > 0:
            if not run.pairs.exists():
                _make_pairs(run, loaded.network, classes, stop)
            pairs = load_pairs(run.pairs, device)
        reports = distil(loaded.network, classes, recipe, config, run, pairs)
        _watch(reports, run, stop)
    save_curves(run.path / "curves.png", run.read_metrics())
    if not run.finished:
        console.print(f"{run.path}: stopped and saved. Go on with: {again}", soft_wrap=True)
        _exit_stopped(stop)


def _make_pairs(run: RunFolder, teacher: EDMNetwork, classes: Classes, stop: StopRequest) -> None:
    config = run.config
    with bar() as progress:
        task = progress.add_task("pairs", total=config.pairs, note="")
        for count in make_pairs(run.pairs, teacher, classes, config):
            progress.update(task, completed=count)
            if stop.signal:
                _exit_stopped(stop)


def _watch(reports: Generator[StepReport], run: RunFolder, stop: StopRequest) -> None:
    """Draw the bar until the reports end or a stop is asked for."""
    with bar() as progress, closing(reports):
        task = progress.add_task("distil", total=run.config.steps, note="")
        for report in reports:
            if run.notes:
                progress.console.print(*run.notes, sep="\n", soft_wrap=True)
                run.notes.clear()
                progress.reset(task, completed=report.step)
            if report.step % LOG_EVERY == 0:
                progress.update(task, note=_losses(report))
            progress.update(task, completed=report.step)
            if stop.signal:
                break


def _losses(report: StepReport) -> str:
    named = {name.split("/")[1]: value for name, value in report.numbers().items()}
    shown = {"distribution_matching": "dm", "regression": "reg", "denoising": "critic"}
    return "  ".join(f"{shown[name]} {named[name]:.3f}" for name in shown if name in named)


def _exit_stopped(stop: StopRequest) -> NoReturn:
    raise typer.Exit(128 + (stop.signal or 0))


def _evaluate(loaded: Loaded, seed: int, run: RunFolder | None = None) -> None:
    """Print the file's numbers, beside its teacher's where that is embedded; keep them in `run`."""
    from .metrics import MEASURE_STAGES, measure_digits
    from .report import numbers_table, save_summary, summary

    if loaded.network.family != DIGITS:
        raise UserError(
            f"{loaded.source}: there is no data here to compare family '{loaded.network.family}' "
            "with. Only digits can be evaluated."
        )
    columns = {"teacher": networks.load(DIGITS, loaded.network.device)}
    if loaded.sha256 != columns["teacher"].sha256:
        columns["student" if loaded.recipe else "file"] = loaded
    numbers = {}
    with bar() as progress:
        for name, column in columns.items():
            task = progress.add_task(f"measure {name}", total=MEASURE_STAGES, note="")
            told = partial(progress.update, task)
            numbers[name] = measure_digits(column.network, column.recipe, seed, told)
    if run:
        save_summary(run.path / "summary.json", summary(numbers["teacher"], numbers["student"]))
    console.print(numbers_table(numbers))


def _contact_sheet(student: Loaded, run: RunFolder) -> Image.Image:
    assert student.recipe
    teacher = networks.load(run.config.teacher, student.network.device).network
    classes = Classes(teacher.classes)
    sheet = SampleSheet(teacher, student.recipe, classes, run.config, count=4 * teacher.classes)
    return sheet.draw(student.network)


def _demo_folder() -> Path:
    """runs/demo; once that is finished, the next of runs/demo-2, runs/demo-3, ..."""
    folder, number = Path("runs/demo"), 1
    while (folder / "summary.json").exists():
        number += 1
        folder = Path(f"runs/demo-{number}")
    return folder


def _sample_command(student: Path) -> str:
    file = shlex.quote(str(student))
    return f"{PYTHON} -m dmd_train sample {file} --class 7 --count 16 --seed 0 --out seven.png"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Bad input is one line on stderr and exit code 2."""
    try:
        app(arguments)
    except UserError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)
