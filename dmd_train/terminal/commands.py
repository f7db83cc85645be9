"""The commands of `python -m dmd_train`. They only iterate what the engine yields."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor

from ..config import DIGITS, UPDATES, Config, load_config, make_config, parse_overrides
from ..data.conditions import Classes
from ..data.prompts import require_prompt
from ..distil import distil
from ..errors import UserError, one_line, out_of_memory
from ..files.mark import MARK_KEY
from ..files.read import peek
from ..files.write import write_atomically, write_latent
from ..method.network import NETWORK_KEY, Condition
from ..method.processes import Processes
from ..method.recipe import RECIPE_KEY, read_recipe
from ..method.sample import draw, step_noise
from ..networks.load import load, load_teacher, save
from ..networks.loaded import Loaded
from ..plan import measure
from ..prepare import carried_out, make_conditions, make_run_pairs, prepare, require_possible
from ..room import require_memory
from ..run.export import FOLDERS, Dtype, Form, export
from ..run.folder import RunFolder, is_run
from ..run.pixels import grid, is_own_picture, picture, save_picture
from ..run.report import write_report
from ..run.sample_sheet import SampleSheet
from ..run.verify import verify
from .bar import STOPPED, StopRequest, bar, console, say, told, watch
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

LAST_SEED = 2**64 - 1

OWN: dict[str, Callable[[Path], bool]] = {
    ".png": is_own_picture,
    ".npy": lambda file: False,  # it has no room to say so
    ".latent": lambda file: MARK_KEY in peek(file)[1],
}
"""Whether a file of samples says that we wrote it."""

MOST = 100_000
"""Images drawn at a time: all of them are in memory."""

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
        _evaluate([student], config.seed, run)
        save_picture(run.path / "contact-sheet.png", _contact_sheet(student, run))
        say(" ".join([f"{run.path}/:", *(path.name for path in sorted(run.path.glob("[!.]*")))]))
        _say_report(write_report(run))
        say("Next:")
        say(_sample_command(run.student))


@app.command(epilog=SETTINGS)
def train(
    run_yaml: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The settings of the run.")],
    set_: SetOption = None,
) -> None:
    """Distil a teacher, or go on with a run that was stopped.

    Ctrl-C saves a checkpoint and the student so far; the same command goes on from there.
    """
    config = _settings(run_yaml, set_)
    with _opened(config) as (run, processes):
        if run.finished:
            if processes.is_main:  # a kill may have come between the student and them
                _draw_curves(run)
            say(f"{run.path}: finished before, at step {config.steps}: {run.student}")
            return
        again = [PYTHON, "-m", "dmd_train", "train", str(run_yaml)]
        again += [part for value in set_ or [] for part in ("--set", value)]
        loaded = _train(run, processes, shlex.join(again))
        _say_report(run.report)
        say(f"{run.path}: finished. Next:")
        say(_export_command(run) if loaded.text else _sample_command(run.student))


@app.command()
def pairs(
    run_yaml: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The settings of the run.")],
    set_: SetOption = None,
) -> None:
    """Make a run's pairs before it, or some of them: Ctrl-C stops, the same command goes on.

    `train` makes them itself if they are not there.
    """
    config = _settings(run_yaml, set_)
    with _opened(config) as (run, processes), StopRequest() as stop:
        loaded = _teacher(config, processes)
        require_possible(run.config, loaded)
        with told(stop) as tell:
            conditions = carried_out(make_conditions(run, loaded, processes), tell)
            carried_out(make_run_pairs(run, loaded, conditions, processes), tell)
        say(f"{run.pairs}: {run.config.pairs} pairs")


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
    config = _settings(run_yaml, set_)
    _set_threads(config)
    with console.status("three iterations"):
        measured = measure(config, config.device_object())
    console.print(plan_table(config, measured))
    for line in measured.advice:
        say(line)


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
    if out:
        _require_own(out, lambda file: RECIPE_KEY in peek(file)[1])
    notes: list[str] = []
    with console.status("export"):
        path = export(run, form, dtype, out, notes)
    for note in notes:
        say(note)
    say(f"{path}: put it into {FOLDERS[form]}")
    recipe = read_recipe(peek(path)[1], str(path))
    if recipe and recipe.stock:
        say(f"A stock ComfyUI draws it: {recipe.stock}, an empty latent")


@app.command("verify")
def verify_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")],
) -> None:
    """What of a run is whole, a line a file. Exit code 1 where something is not."""
    verdicts = []
    for verdict in verify(run):
        say(f"{verdict.file}: {verdict.said}")
        verdicts.append(verdict)
    damaged = sum(not verdict.is_whole for verdict in verdicts)
    say(f"{len(verdicts)} files, {damaged or 'none'} damaged")
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
    count: Annotated[int, typer.Option(min=1, max=MOST, help="How many images.")] = 16,
    seed: Annotated[
        int, typer.Option(min=0, max=LAST_SEED, help="Same seed, same pictures; as in ComfyUI.")
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
    for path in _pictures(out, count):
        _require_own(path, OWN[path.suffix])
    loaded = load(str(file), torch.device("cpu"), base)
    network = loaded.network
    if out.suffix == ".latent" and network.latent_scale is None:
        raise UserError(f"--out {out}: {network.family} models draw pixels, not latents.")
    nfe = loaded.recipe.nfe if loaded.recipe else 1
    values = 4 * count * torch.Size(network.shape).numel()
    require_memory(f"--count {count}", nfe * values, network.device)
    with out_of_memory(f"--count {count}: out of memory. Draw fewer at a time."):
        condition = _condition(loaded, file, class_, prompt, count)
        noise = step_noise(network.shape, count, seed, nfe, network.device)
        x0 = draw(network, loaded.recipe, noise, condition)
        if network.latent_scale and out.suffix == ".latent":
            write_latent(out, x0 / network.latent_scale)
        else:
            _write_images(out, network.to_images(x0).clamp(-1, 1))
    say(str(out))


def _condition(
    loaded: Loaded, file: Path, class_: int | None, prompts: list[str] | None, count: int
) -> Condition:
    """`count` conditions, as the options say; prompts by turns."""
    if loaded.text:
        if class_ is not None or not prompts:
            raise UserError(f'{file} is told prompts: --prompt "a red fox in the snow".')
        for prompt in prompts:
            require_prompt(prompt, "--prompt")
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
            for path, image in zip(_pictures(out, len(images)), images, strict=True):
                save_picture(path, picture(image))


def _pictures(out: Path, count: int) -> list[Path]:
    """The files that `count` images become: one, or in a folder one each."""
    return [out] if out.suffix else [out / f"{i:05d}.png" for i in range(count)]


@app.command()
def evaluate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Students, or a teacher.")],
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Of the fresh samples.")] = 0,
) -> None:
    """Measure files on 2,000 fresh samples: distance to the data, diversity, speed."""
    _evaluate([load(str(file), torch.device("cpu")) for file in files], seed)


@teacher_app.command()
def digits(
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    steps: Annotated[int, typer.Option(min=1, max=UPDATES, help="Optimiser steps.")] = 12000,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED)] = 0,
) -> None:
    """Train the digits teacher from scratch. The same seed gives the same weights."""
    from ..networks.digits import digits, digits_network, train_teacher

    _require_own(out, lambda file: NETWORK_KEY in peek(file)[1])
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    teacher = digits_network()
    with bar() as progress:
        task = progress.add_task("teacher", total=steps, note="")
        for step in train_teacher(teacher, digits(), steps, seed):
            progress.update(task, completed=step)
    save(out, teacher)
    say(str(out))


def _settings(run_yaml: Path, overrides: list[str] | None) -> Config:
    """The settings of a run. Raises UserError where it would be written over this file, and where
    the file lies in the folder of another run than it names."""
    config = load_config(run_yaml, overrides or [])
    begun = (config.output / name for name in (".lock", "checkpoints", "pairs", "text", "images"))
    is_its_own = (config.output / "run.yaml").resolve() == run_yaml.resolve()
    if is_its_own and not any(path.exists() for path in begun):
        raise UserError(
            f"{run_yaml}: output: {config.output} is this file's own folder, and the run writes a "
            "run.yaml there. Name a new folder."
        )
    if not is_its_own and is_run(run_yaml) and "output" not in parse_overrides(overrides or []):
        raise UserError(
            f"{run_yaml}: is of a run in this folder, and names output: {config.output}. Was it "
            f"moved, or are you in another folder? Add --set output={run_yaml.parent}"
        )
    return config


def _require_own(out: Path, is_own: Callable[[Path], bool]) -> None:
    """Raises UserError where `out` is there and does not say of itself that we wrote it."""
    if not out.exists():
        return
    try:
        may_go = out.is_file() and is_own(out)
    except UserError:
        may_go = False
    if not may_go:
        raise UserError(
            f"--out {out}: is there, and does not say that this wrote it. Choose another name."
        )


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
    loaded = _teacher(run.config, processes)
    with StopRequest() as stop:
        with told(stop) as tell:
            ready = carried_out(prepare(run, loaded, processes), tell)
        stopped = watch(distil(ready), run, processes, stop)
    if not processes.is_main:
        raise typer.Exit(STOPPED if stopped else 0)
    _draw_curves(run)
    if stopped:
        _say_report(run.report)
        say(f"{run.path}: stopped and saved. Go on with: {again}")
        stop.exit()
    return loaded


def _draw_curves(run: RunFolder) -> None:
    from ..run.curves import save_curves

    save_curves(run.path / "curves.png", run.read_metrics())


def _say_report(report: Path) -> None:
    say(f"{report}: open it in a browser")


def _evaluate(files: list[Loaded], seed: int, run: RunFolder | None = None) -> None:
    """Print the files' numbers beside their teacher's; keep those of the student of `run`."""
    from ..run.metrics import MEASURE_STAGES, measure_digits, save_summary, summary

    for loaded in files:
        if loaded.network.family != DIGITS:
            raise UserError(
                f"{loaded.source}: there is no data here to compare family "
                f"'{loaded.network.family}' with. Only digits can be evaluated."
            )
    columns = {"teacher": load(DIGITS, files[0].network.device)}
    for loaded in files:
        if loaded.sha256 != columns["teacher"].sha256:
            kind = "student" if loaded.recipe else "file"
            columns[kind if len(files) == 1 else f"{len(columns)}. {kind}"] = loaded
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
    """Run the command line. Bad input is one line on stderr and exit code 2; Ctrl-C is 130."""
    try:
        sys.exit(app(arguments, standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(STOPPED)
    except UserError as error:
        _refuse(str(error))
    except MemoryError:
        _refuse("out of memory. Ask for less at a time.")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _refuse(f"{where}{error.strerror or error}. Check the path, and the room on the disk.")
    except UnicodeEncodeError as error:  # of a path, which older versions of typer look for
        _refuse(f"{error.object}: not a name that a file can have. Check the path.")
    except Exception as error:
        # typer's own for a wrong option, by whichever name its version has for them
        if not hasattr(error, "format_message"):
            raise
        if said := str(error.format_message()):  # none where the help has been shown instead
            _refuse(f"{said} See --help.")
        sys.exit(2)


def _refuse(message: str) -> NoReturn:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"error: {one_line(message)}", markup=False)
    sys.exit(2)
