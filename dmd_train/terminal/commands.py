"""The commands of `python -m dmd_train`. They only iterate what the engine yields."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor

from ..config import DIGITS, Config, load_config, make_config, parse_overrides
from ..data.conditions import Classes
from ..distil import distil
from ..errors import UserError
from ..files.write import write_atomically, write_latent
from ..method.network import Condition
from ..method.processes import Processes
from ..method.sample import draw, step_noise
from ..networks.load import load, load_teacher, save
from ..networks.loaded import Loaded
from ..plan import measure
from ..prepare import carried_out, make_conditions, make_run_pairs, prepare, require_possible
from ..run.export import FOLDERS, Dtype, Form, export
from ..run.folder import RunFolder
from ..run.pixels import grid, picture, save_picture
from ..run.sample_sheet import SampleSheet
from ..run.verify import verify
from .bar import STOPPED, StopRequest, bar, console, told, watch
from .tables import numbers_table, plan_table, preset_tables

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a diffusion model into a generator that needs ONE network evaluation (DMD).",
)
teacher_app = typer.Typer(no_args_is_help=True, help="Train an embedded teacher from scratch.")
app.add_typer(teacher_app, name="teacher")

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


@app.command(epilog=SETTINGS)
def demo(set_: SetOption = None) -> None:
    """Distil the embedded teacher to one step and measure it: the whole job, in minutes."""
    settings = {"teacher": DIGITS, "preset": "digits-one-step", "output": str(_demo_folder())}
    config = make_config(settings | parse_overrides(set_ or []), "demo")
    with _opened(config) as (run, processes):
        _train(run, processes, again=f"{PYTHON} -m dmd_train demo")
        student = load(str(run.student), config.device_object())
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
    with _opened(config) as (run, processes):
        if run.finished:
            said = f"{run.path}: finished before, at step {config.steps}: {run.student}"
            console.print(said, soft_wrap=True)
            return
        again = [PYTHON, "-m", "dmd_train", "train", str(run_yaml)]
        again += [part for value in set_ or [] for part in ("--set", value)]
        loaded = _train(run, processes, shlex.join(again))
        console.print(f"{run.path}: finished. Next:", soft_wrap=True)
        next_ = _export_command(run) if loaded.text else _sample_command(run.student)
        console.print(next_, soft_wrap=True)


@app.command()
def pairs(
    run_yaml: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The settings of the run.")],
    set_: SetOption = None,
) -> None:
    """Make a run's pairs before it, or some of them: Ctrl-C stops, the same command goes on.

    `train` makes them itself if they are not there.
    """
    config = load_config(run_yaml, set_ or [])
    with _opened(config) as (run, processes), StopRequest() as stop:
        loaded = _teacher(config, processes)
        require_possible(config, loaded)
        with told(stop) as tell:
            conditions = carried_out(make_conditions(run, loaded, processes), tell)
            carried_out(make_run_pairs(run, loaded, conditions, processes), tell)
        console.print(f"{run.pairs}: {config.pairs} pairs", soft_wrap=True)


@app.command()
def presets() -> None:
    """Every preset's numbers, and where each comes from."""
    for table in preset_tables():
        console.print(table)


@app.command()
def plan(
    run_yaml: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The settings of the run.")],
    set_: SetOption = None,
) -> None:
    """What a run will train, take and cost here, measured on three iterations. Writes nothing."""
    config = load_config(run_yaml, set_ or [])
    _set_threads(config)
    with console.status("three iterations"):
        measured = measure(config, config.device_object())
    console.print(plan_table(config, measured))
    for line in measured.advice:
        console.print(line, soft_wrap=True)


@app.command("export")
def export_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
    form: Annotated[
        Form,
        typer.Option("--as", help="lora; unet, with a LoRA merged; checkpoint, all in one."),
    ],
    dtype: Annotated[Dtype, typer.Option(help="Of the student's weights.")] = "fp16",
    out: Annotated[Path | None, typer.Option(help="Else RUN/student-FORM.safetensors.")] = None,
) -> None:
    """The newest student of a run as a file that ComfyUI loads; while it trains, too."""
    notes: list[str] = []
    with console.status("export"):
        path = export(run, form, dtype, out, notes)
    for note in notes:
        console.print(note, soft_wrap=True)
    console.print(f"{path}: put it into {FOLDERS[form]}", soft_wrap=True)


@app.command("verify")
def verify_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
) -> None:
    """What of a run is whole, a line a file. Exit code 1 where something is not."""
    verdicts = []
    for verdict in verify(run):
        console.print(f"{verdict.file}: {verdict.said}", soft_wrap=True)
        verdicts.append(verdict)
    damaged = sum(not verdict.is_whole for verdict in verdicts)
    console.print(f"{len(verdicts)} files, {damaged or 'none'} damaged")
    if damaged:
        raise typer.Exit(1)


@app.command()
def sample(
    file: FileArgument,
    out: Annotated[
        Path,
        typer.Option(
            help="A .png (one sheet), a .npy, a .latent for ComfyUI, or a folder (a PNG an image)."
        ),
    ],
    class_: Annotated[
        int | None, typer.Option("--class", help="The class label; left out: all, balanced.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Of a text-conditional model; may be repeated.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="Same seed, same pictures; as in ComfyUI.")
    ] = 0,
    base: Annotated[
        Path | None, typer.Option(help="The checkpoint that a LoRA or a UNet was made from.")
    ] = None,
) -> None:
    """Draw images from a file, in as many steps as the file itself says.

    A .npy holds (N, C, H, W) float32 in [-1, 1]; a .latent what ComfyUI opens.
    """
    if out.suffix not in (".png", ".npy", ".latent", ""):
        raise UserError(f"--out {out}: give a .png, a .npy, a .latent or a folder.")
    loaded = load(str(file), torch.device("cpu"), base)
    network = loaded.network
    if out.suffix == ".latent" and network.latent_scale is None:
        raise UserError(f"--out {out}: {network.family} models draw pixels, not latents.")
    condition = _condition(loaded, file, class_, prompt, count)
    nfe = loaded.recipe.nfe if loaded.recipe else 1
    noise = step_noise(network.shape, count, seed, nfe, network.device)
    x0 = draw(network, loaded.recipe, noise, condition)
    if network.latent_scale and out.suffix == ".latent":
        write_latent(out, x0 / network.latent_scale)
    else:
        _write_images(out, network.to_images(x0).clamp(-1, 1))
    console.print(str(out), soft_wrap=True)


def _condition(
    loaded: Loaded, file: Path, class_: int | None, prompts: list[str] | None, count: int
) -> Condition:
    """`count` conditions, as the options say; prompts by turns."""
    if loaded.text:
        if class_ is not None or not prompts:
            raise UserError(f'{file} is told prompts: --prompt "a red fox in the snow".')
        chosen = [prompts[i % len(prompts)] for i in range(count)]
        return loaded.text.encode(chosen)
    if prompts:
        raise UserError(f"{file} draws classes, not prompts: --class 7.")
    assert loaded.network.classes
    classes = Classes(loaded.network.classes)
    if class_ is None:
        rows = classes.balanced(count)
    elif 0 <= class_ < classes.count:
        rows = torch.full((count,), class_)
    else:
        raise UserError(f"--class {class_}: {file} knows the classes 0 to {classes.count - 1}.")
    return classes.take(rows, loaded.network.device)


def _write_images(out: Path, images: Tensor) -> None:
    match out.suffix:
        case ".npy":
            write_atomically(out, lambda temporary: np.save(temporary, images.numpy()))
        case ".png":
            save_picture(out, grid(images, columns=min(len(images), 8)))
        case _:
            for i, image in enumerate(images):
                save_picture(out / f"{i:05d}.png", picture(image))


@app.command()
def evaluate(
    file: FileArgument,
    seed: Annotated[int, typer.Option(min=0, help="Of the fresh samples.")] = 0,
) -> None:
    """Measure a file on 2,000 fresh samples: distance to the data, diversity, speed."""
    _evaluate(load(str(file), torch.device("cpu")), seed)


@teacher_app.command()
def digits(
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 12000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train the digits teacher from scratch. The same seed gives the same weights."""
    from ..networks.digits import digits_network, train_digits_teacher

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    teacher = digits_network()
    with bar() as progress:
        task = progress.add_task("teacher", total=steps, note="")
        for step in train_digits_teacher(teacher, steps, seed):
            progress.update(task, completed=step)
    save(out, teacher)
    console.print(str(out), soft_wrap=True)


@contextmanager
def _opened(config: Config) -> Iterator[tuple[RunFolder, Processes]]:
    """The run folder, made by the first process, and the processes of the run."""
    _set_threads(config)
    processes = Processes(config.device_object())
    console.quiet = not processes.is_main
    if not processes.is_main:
        processes.wait()
    with RunFolder(config, processes.is_main) as run:
        if processes.is_main:
            processes.wait()
        yield run, processes


def _set_threads(config: Config) -> None:
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)


def _teacher(config: Config, processes: Processes) -> Loaded:
    with console.status("teacher"):
        return load_teacher(config, processes.device)


def _train(run: RunFolder, processes: Processes, again: str) -> Loaded:
    """Bring a run to its end, or exit with the signal's code once a stop has been saved."""
    from ..run.curves import save_curves

    loaded = _teacher(run.config, processes)
    with StopRequest() as stop:
        with told(stop) as tell:
            ready = carried_out(prepare(run, loaded, processes), tell)
        stopped = watch(distil(ready), run, processes, stop)
    if not processes.is_main:
        raise typer.Exit(STOPPED if stopped else 0)
    save_curves(run.path / "curves.png", run.read_metrics())
    if stopped:
        console.print(f"{run.path}: stopped and saved. Go on with: {again}", soft_wrap=True)
        stop.exit()
    return loaded


def _evaluate(loaded: Loaded, seed: int, run: RunFolder | None = None) -> None:
    """Print the file's numbers, beside its teacher's where that is embedded; keep them in `run`."""
    from ..run.metrics import MEASURE_STAGES, measure_digits, save_summary, summary

    if loaded.network.family != DIGITS:
        raise UserError(
            f"{loaded.source}: there is no data here to compare family '{loaded.network.family}' "
            "with. Only digits can be evaluated."
        )
    columns = {"teacher": load(DIGITS, loaded.network.device)}
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
    teacher = load(run.config.teacher, student.network.device).network
    assert teacher.classes
    classes = Classes(teacher.classes)
    sheet = SampleSheet(teacher, student.recipe, classes, run.config, count=4 * teacher.classes)
    for _ in sheet.draw_teacher():
        pass
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


def _export_command(run: RunFolder) -> str:
    what = "lora" if run.config.training == "lora" else "unet"
    return f"{PYTHON} -m dmd_train export {shlex.quote(str(run.path))} --as {what}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Bad input is one line on stderr and exit code 2."""
    try:
        app(arguments)
    except UserError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)
