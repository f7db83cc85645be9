"""One iteration of DMD, and the loop: a generator of StepReport that every door only iterates."""

import math
import time
from collections.abc import Generator
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from .checkpoint import Checkpoint, RunFolder
from .conditions import Conditions
from .config import Config
from .errors import UserError
from .learner import Learner, StudentEMA
from .network import Condition, Network
from .objectives import Denoising, DistributionMatching, Regression
from .pairs import Pairs
from .recipe import Recipe
from .report import SampleSheet, save_picture
from .roles import Roles, three_networks
from .sample import sample_student
from .seeding import generator, randn
from .student import write_student

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
    """Teacher above student on fixed seeds, every sample_every steps."""

    def numbers(self) -> dict[str, float]:
        """The values on the host; waits for the device."""
        numbers = torch.stack(list(self.values.values())).tolist()
        return dict(zip(self.values, numbers, strict=True))


class Distillation:
    """The state of a run and one iteration of it."""

    def __init__(
        self, roles: Roles, recipe: Recipe, conditions: Conditions, config: Config, rank: int = 0
    ) -> None:
        self.roles, self.recipe, self.conditions = roles, recipe, conditions
        self.config, self.rank = config, rank
        self.device = roles.teacher.network.device
        self.student = Learner(roles.student, config)
        self.critic = Learner(roles.critic, config)
        self.ema = StudentEMA(roles.student.parameters, config.ema_decay)
        self.distribution_matching = DistributionMatching(
            roles.teacher.network, roles.critic.network, config.guidance, config.t_min, config.t_max
        )
        self.denoising = Denoising(roles.critic.network)
        self.regression = Regression()

    def _generator(self, step: int, purpose: str) -> torch.Generator:
        return generator(self.device, self.config.seed, step, self.rank, purpose)

    def _generate(self, noise: Tensor, condition: Condition) -> Tensor:
        return sample_student(self.roles.student.network, self.recipe, condition, [noise])

    def iteration(self, step: int, pairs: Pairs | None) -> dict[str, Tensor]:
        """Student update number `step` (from 0), then the critic's (DMD algorithm 1, DMD2 4.2).

        The first critic update uses the very samples the student was just updated on.
        """
        batch = self.config.batch_size
        gen = self._generator(step, "student")
        condition = self.conditions.batch(batch, gen)
        noise = randn((batch, *self.roles.student.network.shape), gen)
        values: dict[str, Tensor] = {}

        if pairs is None:
            x = self._generate(noise, condition)
        else:
            ref = pairs.batch(self.config.pair_batch_size, self._generator(step, "pairs"))
            both = {key: torch.cat([condition[key], ref.condition[key]]) for key in condition}
            x, x_ref = self._generate(torch.cat([noise, ref.noise]), both).tensor_split([batch])
        loss = self.distribution_matching(x, condition, gen)
        values["student/distribution_matching"] = loss.detach()
        if pairs is not None:
            regression = self.regression(x_ref, ref.image)
            values["student/regression"] = regression.detach()
            loss = loss + self.config.regression_weight * regression
        values["student/gradient_norm"] = self.student.update(loss, step)
        self.ema.update(step)

        for update in range(self.config.critic_updates):
            gen = self._generator(step, f"critic {update}")
            if update > 0:
                condition = self.conditions.batch(batch, gen)
                with torch.no_grad():
                    x = self._generate(randn(x.shape, gen), condition)
            loss = self.denoising(x, condition, gen)
            values["critic/gradient_norm"] = self.critic.update(loss, step)
        values["critic/denoising"] = loss.detach()
        return values

    def tensors(self) -> dict[str, Tensor]:
        """Everything a run needs to go on, flat."""
        parts = {
            "student": self.student.tensors(),
            "critic": self.critic.tensors(),
            "ema": self.ema.average,
        }
        return {f"{part}/{k}": v for part, flat in parts.items() for k, v in flat.items()}

    def averaged_student(self) -> Network:
        """A copy of the student with the averaged parameters."""
        student = self.roles.student.network.copy()
        parameters = dict(student.module.named_parameters())
        with torch.no_grad():
            for name, average in self.ema.average.items():
                parameters[name].copy_(average)
        return student

    def restore(self, tensors: dict[str, Tensor]) -> None:
        def part(name: str) -> dict[str, Tensor]:
            prefix = f"{name}/"
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.student.restore(part("student"))
        self.critic.restore(part("critic"))
        for name, value in part("ema").items():
            self.ema.average[name].copy_(value)


def distil(
    teacher: Network,
    conditions: Conditions,
    recipe: Recipe,
    config: Config,
    run: RunFolder,
    pairs: Pairs | None = None,
) -> Generator[StepReport]:
    """Distil `teacher` into `run`, from its newest checkpoint on, reporting every student update.

    Closing the generator between two reports is the way to stop: the state and the student so far
    are saved. Raises UserError on a non-finite loss; what was saved before stays.
    """
    state = Distillation(three_networks(teacher), recipe, conditions, config)
    sheet = SampleSheet(teacher, recipe, conditions, config)
    journal = Journal(run)
    step = saved = 0
    if checkpoint := run.newest():
        step = saved = checkpoint.step
        state.restore(checkpoint.tensors)
    run.forget_after(step)

    def save() -> None:
        nonlocal saved
        journal.flush()
        if step > saved:
            run.save(Checkpoint(step, state.tensors()))
            saved = step

    try:
        while step < config.steps:
            values = state.iteration(step, pairs)
            step += 1
            journal.add(step, values)
            if step % config.checkpoint_every == 0:
                save()
            picture = None
            if step % config.sample_every == 0:
                picture = sheet.draw(state.averaged_student())
                save_picture(run.samples / f"step-{step:08d}.png", picture)
            yield StepReport(step, config.steps, values, picture)
    except GeneratorExit:
        save()
        write_student(run.student, state.averaged_student(), recipe)
        raise
    save()
    write_student(run.student, state.averaged_student(), recipe)


class Journal:
    """metrics.jsonl, written LOG_EVERY steps at a time, and the watch for non-finite values."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
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
        table = torch.stack([torch.stack(list(values.values())) for _, values in waiting]).tolist()
        seconds = (time.monotonic() - self.since) / len(waiting)
        self.since = time.monotonic()
        rows = [
            {"step": step, **dict(zip(values, numbers, strict=True)), "seconds": seconds}
            for (step, values), numbers in zip(waiting, table, strict=True)
        ]
        for i, row in enumerate(rows):
            bad = next((name for name, number in row.items() if not math.isfinite(number)), None)
            if bad:
                self.run.log(rows[:i])
                raise UserError(
                    f"{self.run.path}: {bad.replace('/', ': ')} became {row[bad]} at step "
                    f"{row['step']}. The last checkpoint is kept; lower learning_rate and go on."
                )
        self.run.log(rows)
