"""What a run will take, before it starts: three iterations of the real thing, in memory."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from .config import Config
from .data.pairs import PairBatch, Pairs
from .data.pictures import PictureBatch
from .data.prompts import SHARD, read_prompts
from .errors import OutOfMemory, out_of_memory
from .files.write import write_text
from .iteration import Distillation
from .method.network import Network
from .method.sample import sample_teacher
from .method.seeding import generator, randn
from .networks.load import load_teacher
from .networks.loaded import Loaded
from .prepare import carried_out, pictures_of, prepare
from .room import disk_room, memory_of
from .run.folder import KEEP, RunFolder

ITERATIONS = 3


class RandomPairs(Pairs):
    """Pairs of noise alone: they cost what real ones do."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def draw(self, size: int, gen: torch.Generator) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int64)

    def take(self, numbers: torch.Tensor, device: torch.device) -> PairBatch:
        noise = randn((len(numbers), *self.shape), generator(device, 0, "plan"))
        return PairBatch(numbers, noise, noise)


def _few_images(config: Config, network: Network) -> PictureBatch:
    """Two black images. Raises UserError where config.images names none."""
    pictures_of(config, network)
    _, height, width = network.shape
    return PictureBatch(torch.zeros(2, 3, network.downscale * height, network.downscale * width))


@dataclass(frozen=True)
class Rehearsal:
    """Three iterations of a run: bytes, and seconds.

    iteration: median of three; pair: of one; peak: None where they did not fit. condition: values
    that one prompt is encoded to.
    """

    trained: int
    weights: int
    condition: int
    iteration: float
    pair: float
    peak: int | None


@dataclass(frozen=True)
class Measured:
    """A whole run: bytes and seconds. pairs: seconds until they are made."""

    what: str
    device: torch.device
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
    """A run's figures. Raises UserError for what `train` would refuse."""
    loaded = load_teacher(config, device)
    shape = loaded.network.shape
    prompts = read_prompts(config.prompts) if loaded.text else []
    with _small_run(config, prompts[:SHARD]) as run:
        rehearsal = _rehearse(run, loaded, device)
    room = memory_of(device)
    fits = rehearsal.peak is not None and rehearsal.peak <= room
    trained, needs_pairs = rehearsal.trained, config.needs_pairs
    return Measured(
        what=f"{config.training}, {trained / 1e6:.1f} M parameters of student and critic each",
        device=device,
        weights=rehearsal.weights,
        iteration=rehearsal.iteration,
        pairs=rehearsal.pair * config.pairs if needs_pairs else 0.0,
        peak=rehearsal.peak,
        room=room,
        ram=_peak_ram(),
        disk=_disk(config, trained, len(prompts) * rehearsal.condition, torch.Size(shape).numel()),
        disk_room=disk_room(config.output),
        advice=() if fits else (config.smaller,),
    )


@contextmanager
def _small_run(config: Config, prompts: list[str]) -> Iterator[RunFolder]:
    """The run with few of its prompts, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        moved: dict[str, Any] = {"output": Path(folder, "run")}
        if prompts:
            moved["prompts"] = str(Path(folder, "prompts.txt"))
            write_text(Path(folder, "prompts.txt"), "\n".join(prompts))
        with RunFolder(config.model_copy(update=moved)) as run:
            yield run


def _rehearse(run: RunFolder, loaded: Loaded, device: torch.device) -> Rehearsal:
    config = run.config
    _reset_peak(device)
    trained = weights = condition = 0
    seconds, pair = float("nan"), 0.0
    peak: int | None = None
    try:
        pairs = RandomPairs(loaded.network.shape)
        few = _few_images(config, loaded.network) if config.images else None
        prepared = prepare(run, loaded, pairs=pairs, pictures=False, real=few)
        ready = carried_out(prepared, lambda _: None)
        state, roles = ready.state, ready.state.roles
        trained = sum(p.numel() for p in roles.student.parameters.values())
        modules = {role.network.module for role in (roles.teacher, roles.critic, roles.student)}
        weights = sum(p.nbytes for module in modules for p in module.parameters())
        one = state.conditions.take(torch.zeros(1).long(), device)
        condition = sum(value.numel() for value in one.values())
        with out_of_memory("an iteration does not fit"):
            warm = min(config.regression_warmup_steps, 1)
            first = config.regression_warmup_steps - warm
            steps = range(first, first + warm + ITERATIONS)
            times = [_timed(partial(state.iteration, step, ready.pairs), device) for step in steps]
            seconds = statistics.median(times[-ITERATIONS:])
            if ready.pairs is not None:
                pair = _pair_seconds(state, device)
        peak = _peak(device)
    except OutOfMemory:
        pass
    return Rehearsal(trained, weights, condition, seconds, pair, peak)


def _disk(config: Config, trained: int, text: int, latent: int) -> int:
    """Bytes of a run's folder. text, latent: values of all encoded prompts, of one sample."""
    state = trained * 4 * (3 + 3 + (config.ema_decay > 0))  # values and two moments, of both
    pairs = config.pairs * latent * 4 if config.needs_pairs else 0  # noise and image, in 2 each
    return KEEP * state + trained * 2 + text * 2 + pairs


def _pair_seconds(state: Distillation, device: torch.device) -> float:
    """Seconds of one pair: two steps of the teacher's sampler, times half their number."""
    config, conditions, teacher = state.config, state.conditions, state.roles.teacher.network
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
    """Bytes of a GPU that torch reserved; otherwise what the process ever had of RAM."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _peak_ram()


def _peak_ram() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
