"""One iteration of DMD, and the loop: a generator of StepReport that every door only iterates."""

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from .config import Config
from .data.conditions import Conditions
from .data.pairs import Pairs
from .errors import UserError
from .learner import Learner, StudentEMA
from .method.network import Condition, Network
from .method.objectives import Denoising, DistributionMatching, Regression
from .method.processes import Processes, whole
from .method.recipe import Recipe
from .method.roles import Roles, three_networks, two_adapters
from .method.sample import sample_student
from .method.seeding import generator, randn
from .run.folder import Checkpoint, RunFolder
from .run.report import SampleSheet, save_picture
from .run.student import write_student
from .run.trackers import Trackers

LOG_EVERY = 10
"""Student updates between two looks at the losses: one host-device sync for all of them."""


@dataclass(frozen=True)
class StepReport:
    """What one student update did. step counts from 1."""

    step: int
    steps: int
    values: dict[str, Tensor]
    """Scalars still on the device: losses and gradient norms by name."""
    picture: Image | None
    """Teacher above student on fixed seeds: first, last and every sample_every steps."""

    def numbers(self) -> dict[str, float]:
        """The values on the host; waits for the device."""
        numbers = torch.stack(list(self.values.values())).tolist()
        return dict(zip(self.values, numbers, strict=True))

    def losses(self) -> str:
        """For a bar, in few words; waits for the device."""
        named = {name.split("/")[1]: value for name, value in self.numbers().items()}
        shown = {"distribution_matching": "dm", "regression": "reg", "denoising": "critic"}
        return "  ".join(f"{shown[name]} {named[name]:.3f}" for name in shown if name in named)


@dataclass(frozen=True)
class Draw:
    """Everything random of one update: of the whole batch, then of this process's part of it.

    row: (B,) on the CPU; z, eps: (B, C, H, W); t: (B,).
    """

    row: Tensor
    z: Tensor
    t: Tensor
    eps: Tensor

    def split(self, size: int) -> Iterator["Draw"]:
        """Micro-batches of `size`; 0: the whole."""
        columns = (self.row, self.z, self.t, self.eps)
        for part in zip(*(x.split(size or len(x)) for x in columns), strict=True):
            yield Draw(*part)


class Distillation:
    """The state of a run and one iteration of it."""

    def __init__(
        self,
        roles: Roles,
        recipe: Recipe,
        conditions: Conditions,
        config: Config,
        regression: Regression | None = None,
    ) -> None:
        self.roles, self.recipe, self.conditions, self.config = roles, recipe, conditions, config
        self.device = roles.teacher.network.device
        self.processes = Processes(self.device)
        self.student = Learner(roles.student, config, self.processes)
        self.critic = Learner(roles.critic, config, self.processes)
        self.ema = StudentEMA(roles.student.parameters, config.ema_decay)
        self.distribution_matching = DistributionMatching(
            roles.teacher.network, roles.critic.network, config.guidance, config.t_min, config.t_max
        )
        self.denoising = Denoising(roles.critic.network)
        self.regression = regression or Regression()
        if config.gradient_checkpointing:
            for role in (roles.critic, roles.student):
                role.network.checkpoint_gradients()

    def _draw(self, objective: DistributionMatching | Denoising, step: int, purpose: str) -> Draw:
        gen = generator(self.device, self.config.seed, step, purpose)
        rows = generator(torch.device("cpu"), self.config.seed, step, purpose, "conditions")
        shape = torch.Size((self.config.batch_size, *self.roles.student.network.shape))
        row, z = self.conditions.rows(shape[0], rows), randn(shape, gen)
        return Draw(*(self.processes.part(x) for x in (row, z, *objective.draw(shape, gen))))

    def _generate(self, noise: Tensor, condition: Condition) -> Tensor:
        return sample_student(self.roles.student.network, self.recipe, condition, [noise])

    def iteration(self, step: int, pairs: Pairs | None) -> dict[str, Tensor]:
        """Student update number `step` (from 0), then the critic's (DMD algorithm 1, DMD2 4.2).

        The first critic update uses the very samples the student was just updated on. In the
        warm-up the student learns from pairs alone (DMD2 4.5), and the critic waits.
        """
        values: dict[str, Tensor] = {}
        warming_up = step < self.config.regression_warmup_steps
        if not warming_up:
            draw = self._draw(self.distribution_matching, step, "student")
            matching, samples = self._match(draw)
            values["student/distribution_matching"] = matching
        if pairs is not None and (warming_up or self.config.regression_weight > 0):
            weight = 1.0 if warming_up else self.config.regression_weight
            values["student/regression"] = self._regress(step, pairs, weight)
        values["student/gradient_norm"] = self.student.update(step)
        self.ema.update(step)
        if warming_up:
            return values

        for update in range(self.config.critic_updates):
            noised = self._draw(self.denoising, step, f"critic {update}")
            if update == 0:
                noised = replace(noised, row=draw.row)
                values["critic/denoising"] = self._denoise(noised, samples)
            else:
                values["critic/denoising"] = self._denoise(noised)
            values["critic/gradient_norm"] = self.critic.update(step)
        return values

    def _match(self, draw: Draw) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the distribution matching. Returns its value, and the samples."""
        total, samples = torch.zeros((), device=self.device), []
        for part in draw.split(self.config.micro_batch_size):
            condition = self.conditions.take(part.row, self.device)
            x = self._generate(part.z, condition)
            loss = self.distribution_matching(x, condition, part.t, part.eps)
            loss = loss * (len(x) / len(draw.z))
            loss.backward()
            total += loss.detach()
            samples.append(x.detach())
        return total, samples

    def _regress(self, step: int, pairs: Pairs, weight: float) -> Tensor:
        """Gradients of weight times the regression. Returns its value, without the weight."""
        total = torch.zeros((), device=self.device)
        gen = generator(torch.device("cpu"), self.config.seed, step, "pairs")
        numbers = self.processes.part(pairs.draw(self.config.pair_batch_size, gen))
        for part in numbers.split(self.config.micro_batch_size or len(numbers)):
            ref = pairs.take(part, self.device)
            x_ref = self._generate(ref.noise, self.conditions.take(ref.row, self.device))
            loss = self.regression(x_ref, ref.image) * (len(part) / len(numbers))
            (weight * loss).backward()
            total += loss.detach()
        return total

    def _denoise(self, draw: Draw, samples: list[Tensor] | None = None) -> Tensor:
        """Gradients of the critic's loss on `samples`, or on fresh ones. Returns its value."""
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(draw.split(self.config.micro_batch_size)):
            condition = self.conditions.take(part.row, self.device)
            if samples is None:
                with torch.no_grad():
                    x = self._generate(part.z, condition)
            else:
                x = samples[i]
            loss = self.denoising(x, condition, part.t, part.eps) * (len(x) / len(draw.z))
            loss.backward()
            total += loss.detach()
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Everything a run needs to go on, flat."""
        parts = {
            "student": self.student.tensors(),
            "critic": self.critic.tensors(),
            "ema": self.ema.average,
        }
        return {f"{part}/{k}": v for part, flat in parts.items() for k, v in flat.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        def part(name: str) -> dict[str, Tensor]:
            prefix = f"{name}/"
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.student.restore(part("student"))
        self.critic.restore(part("critic"))
        for name, value in part("ema").items():
            self.ema.average[name].copy_(value)


def make_roles(teacher: Network, config: Config) -> Roles:
    """As config.training says. Raises UserError for what cannot be spread over processes."""
    if Processes(teacher.device).is_sharded and (config.training == "lora" or config.ema_decay):
        raise UserError(
            "FSDP is for training: full with ema_decay: 0. Leave --use_fsdp out: adapters fit."
        )
    if config.training == "full":
        return three_networks(teacher)
    return two_adapters(teacher, config.lora_rank, config.lora_alpha, config.seed)


def distil(
    teacher: Network,
    conditions: Conditions,
    recipe: Recipe,
    config: Config,
    run: RunFolder,
    pairs: Pairs | None = None,
    regression: Regression | None = None,
) -> Generator[StepReport]:
    """Distil `teacher` into `run`, from its newest checkpoint on, reporting every student update.

    Closing the generator between two reports is the way to stop: the state and the student so far
    are saved. Raises UserError on a non-finite loss and out of memory; what was saved before stays.
    Of several processes the first writes, and all must stop at the same step.
    """
    try:
        yield from _distil(teacher, conditions, recipe, config, run, pairs, regression)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{run.path}: out of memory. Its checkpoints are kept. {config.smaller}"
        ) from None


def _distil(
    teacher: Network,
    conditions: Conditions,
    recipe: Recipe,
    config: Config,
    run: RunFolder,
    pairs: Pairs | None,
    regression: Regression | None,
) -> Generator[StepReport]:
    state = Distillation(make_roles(teacher, config), recipe, conditions, config, regression)
    student, is_main = state.roles.student.network, state.processes.is_main
    looks = is_main or state.processes.is_sharded  # a sharded network needs all processes
    shown = state.roles.teacher.network
    sheet = SampleSheet(shown, recipe, conditions, config) if looks else None
    journal = Journal(run, state.processes)
    step = saved = 0
    if checkpoint := run.newest():
        step = saved = checkpoint.step
        state.restore(checkpoint.tensors)
    del checkpoint
    state.processes.wait()
    if is_main:
        run.forget_after(step)

    def save() -> None:
        nonlocal saved
        journal.flush()
        if step > saved and looks:
            tensors = state.tensors()
            if is_main:
                run.save(Checkpoint(step, tensors))
        saved = step

    def finish() -> None:
        save()
        with state.ema.swapped_in():
            tensors = {key: whole(value) for key, value in student.file_tensors().items()}
            if is_main:
                write_student(run.student, student, recipe, tensors)
        journal.trackers.close()
        state.processes.wait()

    try:
        while step < config.steps:
            values = state.iteration(step, pairs)
            step += 1
            journal.add(step, values)
            if step % config.checkpoint_every == 0:
                save()
            picture = None
            if sheet and (step % config.sample_every == 0 or step in (1, config.steps)):
                with state.ema.swapped_in():
                    picture = sheet.draw(student, state.distribution_matching)
                if is_main:
                    save_picture(run.samples / f"step-{step:08d}.png", picture)
                    journal.trackers.picture(step, picture)
            yield StepReport(step, config.steps, values, picture)
    except GeneratorExit:
        finish()
        raise
    finish()


class Journal:
    """metrics.jsonl, written LOG_EVERY steps at a time, and the watch for non-finite values."""

    def __init__(self, run: RunFolder, processes: Processes) -> None:
        self.run, self.processes = run, processes
        self.trackers = Trackers(run.config, run.path)
        self.waiting: list[tuple[int, dict[str, Tensor]]] = []
        self.since = time.monotonic()

    def add(self, step: int, values: dict[str, Tensor]) -> None:
        self.waiting.append((step, values))
        if len(self.waiting) >= LOG_EVERY:
            self.flush()

    def flush(self) -> None:
        """Raises UserError on a value that is not finite, having written what came before it."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        flat = torch.stack([value for _, values in waiting for value in values.values()])
        numbers = iter(self.processes.mean(flat).tolist())
        seconds = (time.monotonic() - self.since) / len(waiting)
        self.since = time.monotonic()
        rows = [
            {"step": step, **{name: next(numbers) for name in values}, "seconds": seconds}
            for step, values in waiting
        ]
        for i, row in enumerate(rows):
            bad = next((name for name, number in row.items() if not math.isfinite(number)), None)
            if bad:
                self._log(rows[:i])
                raise UserError(
                    f"{self.run.path}: {bad.replace('/', ': ')} became {row[bad]} at step "
                    f"{row['step']}. The last checkpoint is kept; lower learning_rate and go on."
                )
        self._log(rows)

    def _log(self, rows: list[dict[str, Any]]) -> None:
        if self.processes.is_main:
            self.run.log(rows)
            for row in rows:
                self.trackers.log(row)
