"""What a run will take, before it starts: three iterations of the real thing, in memory."""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from rich.table import Table

from .config import Config
from .data.conditions import Classes, Conditions, Prompts
from .data.pairs import PairBatch, Pairs
from .data.prompts import SHARD, encode_prompts, read_prompts
from .distil import Distillation, make_roles
from .files.shards import Shards
from .method.objectives import Regression
from .method.sample import sample_teacher
from .method.seeding import generator, randn
from .networks.edm import EDMNetwork
from .networks.load import load_teacher
from .networks.loaded import one_step_recipe
from .prepare import regression_distance, require_possible

ITERATIONS = 3
GIB = 1 << 30
CHECKPOINTS = 2


class RandomPairs(Pairs):
    """Pairs of noise alone: they cost what real ones do."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def draw(self, size: int, gen: torch.Generator) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int64)

    def take(self, numbers: torch.Tensor, device: torch.device) -> PairBatch:
        noise = randn((len(numbers), *self.shape), generator(device, 0, "plan"))
        return PairBatch(numbers, noise, noise)


@dataclass(frozen=True)
class Measured:
    """Bytes and seconds. iteration: median of three; peak: None where they did not fit."""

    what: str
    device: torch.device
    trained: int
    weights: int
    iteration: float
    pairs: float
    peak: int | None
    room: int
    ram: int
    disk: int
    disk_room: int
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.peak is not None and self.peak <= self.room and self.disk <= self.disk_room


def measure(config: Config, device: torch.device) -> Measured:
    """Raises UserError for what `train` would refuse."""
    loaded = load_teacher(config, device)
    require_possible(config, loaded)
    recipe = one_step_recipe(loaded, config)
    shape, prompts = loaded.network.shape, list[str]()
    distance = regression_distance(config, loaded.network)
    conditions: Conditions
    if isinstance(loaded.network, EDMNetwork):
        conditions = Classes(loaded.network.classes)
    else:
        assert loaded.text
        prompts = read_prompts(config.prompts)
        few = prompts[:SHARD]
        with tempfile.TemporaryDirectory() as folder:
            for _ in encode_prompts(Path(folder), few, loaded.text.to(device), "plan"):
                pass
            encoded = Shards(Path(folder))
        loaded.text.to(torch.device("cpu"))
        conditions = Prompts(few, encoded)
    _reset_peak(device)
    peak: int | None = None
    seconds, pair_seconds, trained, weights = float("nan"), 0.0, 0, 0
    try:
        state = Distillation(
            make_roles(loaded.network, config), recipe, conditions, config, Regression(distance)
        )
        roles = state.roles
        trained = sum(p.numel() for p in roles.student.parameters.values())
        modules = {role.network.module for role in (roles.teacher, roles.critic, roles.student)}
        weights = sum(p.nbytes for module in modules for p in module.parameters())
        pairs = RandomPairs(shape) if config.needs_pairs else None
        warm = min(config.regression_warmup_steps, 1)
        first = config.regression_warmup_steps - warm
        steps = range(first, first + warm + ITERATIONS)
        times = [_timed(partial(state.iteration, step, pairs), device) for step in steps]
        seconds = statistics.median(times[-ITERATIONS:])
        if pairs is not None:
            pair_seconds = _pair_seconds(state, conditions, config, device)
        peak = _peak(device)
    except torch.OutOfMemoryError:
        pass
    student = trained * 4 * (3 + 3 + (config.ema_decay > 0))  # values and two moments, of both
    latent = torch.Size(shape).numel()
    text = sum(v.numel() for v in conditions.take(torch.zeros(1).long(), device).values())
    disk = CHECKPOINTS * student + trained * 2 + len(prompts) * text * 2
    disk += config.pairs * latent * 4 if config.needs_pairs else 0
    room = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _ram_room()
    what = f"{config.training}, {trained / 1e6:.1f} M parameters of student and critic each"
    return Measured(
        what=what,
        device=device,
        trained=trained,
        weights=weights,
        iteration=seconds,
        pairs=pair_seconds * config.pairs if config.needs_pairs else 0.0,
        peak=peak,
        room=room,
        ram=_peak_ram(),
        disk=disk,
        disk_room=shutil.disk_usage(_existing(config.output)).free,
        advice=() if peak is not None and peak <= room else (config.smaller,),
    )


def plan_table(config: Config, plan: Measured) -> Table:
    """For the terminal."""
    table = Table(title=f"{config.teacher}, preset {config.preset}", show_header=False)
    peak = "does not fit" if plan.peak is None else f"{plan.peak / GIB:.2f} GiB"
    memory = "GPU memory" if plan.device.type == "cuda" else "memory"
    rows = {
        "trained": plan.what,
        f"peak {memory}": f"{peak} of {plan.room / GIB:.1f} GiB",
        "of which weights": f"{plan.weights / GIB:.2f} GiB",
        "peak RAM": f"{plan.ram / GIB:.2f} GiB",
        "disk": f"{plan.disk / GIB:.2f} GiB of {plan.disk_room / GIB:.0f} GiB free",
        "an iteration": f"{plan.iteration:.2f} s (median of {ITERATIONS})",
        "pairs": _duration(plan.pairs) if config.needs_pairs else "none needed",
        f"the run, {config.steps} steps": _duration(plan.iteration * config.steps + plan.pairs),
        "fits": "yes" if plan.fits else "NO",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _pair_seconds(
    state: Distillation, conditions: Conditions, config: Config, device: torch.device
) -> float:
    """Of one pair: two steps of the teacher's sampler, times half their number."""
    teacher = state.roles.teacher.network
    batch = config.pair_batch_size
    condition = conditions.take(conditions.balanced(batch), device)
    z = randn((batch, *teacher.shape), generator(device, 0, "plan"))
    sampler, guidance = config.pair_sampler, config.guidance
    two = _timed(lambda: sample_teacher(teacher, z, condition, sampler, 2, guidance), device)
    return two / 2 * config.pair_steps / batch


def _timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """On a GPU, what torch reserved of it; otherwise what the process ever had of RAM."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _peak_ram()


def _peak_ram() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _ram_room() -> int:
    return int(psutil.virtual_memory().total)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds % 60:.0f} s"
