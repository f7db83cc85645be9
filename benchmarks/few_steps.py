"""Students of one to four steps at the same cost: what makes several steps learn, as a table.

    python benchmarks/few_steps.py                         # what is not in the results yet
    python benchmarks/few_steps.py --only schedule bar     # of these series
    python benchmarks/few_steps.py --tables                # Markdown of what is there

Testbeds: tests/kit/testbeds.py. Cost is counted in network evaluations of a sample (a forward is 1,
with its backward 3): every row trains for as many student updates as the testbed's budget pays, and
is then held against the guided teacher by the Frechet distance of 1,024 samples. A run is a line of
results.jsonl, which is not run again. Each is a function of its seed. One thread.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from kit.testbeds import (  # noqa: E402
    CPU,
    SAMPLER,
    SAMPLER_STEPS,
    Testbed,
    count_evaluations,
    testbed_c,
    testbed_m,
)
from kit.tiny import pairs_of  # noqa: E402
from torch import Tensor  # noqa: E402

from dmd_train.config import Config, make_config  # noqa: E402
from dmd_train.data.pairs import Pairs  # noqa: E402
from dmd_train.iteration import Distillation, Draw  # noqa: E402
from dmd_train.method.network import Condition, guided_x0  # noqa: E402
from dmd_train.method.noise import per_sample  # noqa: E402
from dmd_train.method.objectives import DistributionMatching, draw_timesteps  # noqa: E402
from dmd_train.method.sample import (  # noqa: E402
    eps_hat,
    rollout,
    sample_teacher,
)
from dmd_train.method.seeding import generator, randn  # noqa: E402
from dmd_train.networks.loaded import student_recipe  # noqa: E402
from dmd_train.prepare import make_roles  # noqa: E402

Row = dict[str, Any]

COMMON: Row = {
    "teacher": "a testbed",
    "output": "unused",
    "preset": "sd15-one-step-lora",
    "cpu_threads": 1,
    "gradient_checkpointing": False,
    "input_noise": "unit",
    "beta1": 0.9,
    "steps": 1,
    "batch_size": 8,
    "micro_batch_size": 0,
    "warmup_steps": 0,
    "schedule": "cosine",
    "ema_decay": 0.95,
    "guidance": 1.5,
    "regression_weight": 0.0,
    "regression_warmup_steps": 0,
    "regression_loss": "mse",
    "pairs": 256,
    "pair_batch_size": 8,
}
BASES: dict[str, Row] = {
    "M": COMMON | {"learning_rate": 3e-3, "lora_rank": 8, "lora_alpha": 8.0, "critic_updates": 5},
    "C": COMMON | {"training": "full", "learning_rate": 8e-4, "critic_updates": 4, "t_max": 700},
}
BUDGETS = {"M": 30_000, "C": 15_000}


class MatchedBelow(Distillation):
    """Matching at noise below the student's own step alone (Decoupled DMD, arXiv 2511.22677)."""

    def _draw(self, objective: Any, step: int, purpose: str) -> Draw:
        draw = super()._draw(objective, step, purpose)
        if not isinstance(objective, DistributionMatching):
            return draw
        own = self.recipe.timesteps[draw.between.shape[1]]
        low, high = self.config.t_min, max(self.config.t_min + 1, min(self.config.t_max, own))
        gen = generator(CPU, self.config.seed, step, purpose, "below")
        return replace(draw, t=draw_timesteps(low, high, len(draw), gen))


class LastAlone(Distillation):
    """Every update learns at the last step; the steps before it are what they become."""

    def _draw_between(self, shape: torch.Size, step: int, purpose: str) -> Tensor:
        gen = generator(CPU, self.config.seed, step, purpose, "all between")
        return randn((shape[0], self.recipe.nfe - 1, *shape[1:]), gen)


class PairsAtTheStart(Distillation):
    """Regression of the first step's x0 on the pair, of a deterministic student too."""

    def _regress(self, step: int, pairs: Pairs, weight: float) -> Tensor:
        gen = generator(CPU, self.config.seed, step, "pairs")
        numbers = pairs.draw(self.config.pair_batch_size, gen)
        ref = pairs.take(numbers, self.device)
        condition = self.conditions.take(ref.row, self.device)

        def loss(_: Tensor) -> Tensor:
            x = rollout(self.roles.student.network, self.recipe, condition, [ref.noise])
            return self.distance(x, ref.image)

        return self._accumulate([numbers], len(numbers), loss, weight)


class Anchored(Distillation):
    """The first step learns the teacher's state at the second's timestep, and by that alone.

    DP-DMD (arXiv 2602.03139): the teacher goes there in 5 steps of DDIM from the same noise, and
    matching teaches the other steps. Without pairs.
    """

    def _draw_between(self, shape: torch.Size, step: int, purpose: str) -> Tensor:
        between = super()._draw_between(shape, step, purpose)
        if purpose != "student" or between.shape[1]:
            return between
        gen = generator(CPU, self.config.seed, step, "the second for the first")
        return randn((shape[0], 1, *shape[1:]), gen)

    def _match(self, draw: Draw, step: int) -> tuple[dict[str, Tensor], list[Tensor]]:
        condition = self.conditions.take(draw.row, self.device)
        target = self._anchor(draw.z, condition)
        first = rollout(self.roles.student.network, self.recipe, condition, [draw.z])
        torch.autograd.backward(self.distance(first, target))
        return super()._match(draw, step)

    @torch.no_grad()
    def _anchor(self, z: Tensor, condition: Condition) -> Tensor:
        """The x0 of a first step that ends where the teacher's ODE is at the second timestep."""
        teacher, (first, second, *_) = self.roles.teacher.network, self.recipe.timesteps
        noise, x = teacher.noise, z
        grid = torch.linspace(first, second, 6).round().long()
        for now, after in pairwise(grid):
            t = now.expand(len(z))
            mu = guided_x0(teacher, x, t, condition, self.config.guidance)
            x = noise.add(mu, eps_hat(noise, x, mu, t), after.expand(len(z)))
        t, t_next = (grid[i].expand(len(z)) for i in (0, -1))
        ratio = per_sample(noise.sigma(t_next) / noise.sigma(t))
        # x = alpha' x0 + sigma' (z - alpha x0) / sigma, solved for x0
        own = per_sample(noise.alpha(t_next)) - ratio * per_sample(noise.alpha(t))
        return ((x - ratio * z) / own).to(z.dtype)


class Pulled(Distillation):
    """The critic drawn to the student after each of its updates (IDA, arXiv 2506.00523)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        update, roles = self.student.update, (self.critic.parameters, self.student.parameters)

        def pulling(step: int) -> Tensor:
            norm = update(step)
            with torch.no_grad():
                for critics, students in zip(*(role.values() for role in roles), strict=True):
                    critics.lerp_(students, 0.05)
            return norm

        self.student.update = pulling  # type: ignore[method-assign]


WAYS = {
    way.__name__: way
    for way in (Distillation, MatchedBelow, LastAlone, PairsAtTheStart, Anchored, Pulled)
}


def at(*timesteps: int, way: type[Distillation] = Distillation, **settings: Any) -> Row:
    return {"timesteps": list(timesteps), "way": way.__name__} | settings


@dataclass(frozen=True)
class Series:
    """Rows that are held against each other."""

    bed: str
    rows: list[Row]
    seeds: tuple[int, ...] = (0,)


FEW: Row = {"regression_weight": 2.0}
ODE: Row = {"sampler": "deterministic"}
SLOW: Row = {"learning_rate": 1e-4}
STOCK: Row = {"input_noise": "sigma"}
CALM: Row = {"beta1": 0.0}
S999, S699, S499 = (999, 749, 499, 249), (699, 524, 349, 174), (499, 374, 249, 124)
S799 = (799, 599, 399, 199)
"""With STOCK, exact in a stock KSampler at denoise 0.8."""

SERIES: dict[str, Series] = {
    "bar": Series(
        "C",
        [
            at(399, **FEW),
            at(499, **FEW, **STOCK),
            at(*S799, **ODE, **FEW, **STOCK, **SLOW),
            at(499, **FEW, **STOCK, **SLOW),
            at(*S699, **ODE, **FEW, **SLOW),
        ],
        (0, 1, 2),
    ),
    "stock": Series(
        "M",
        [
            at(499, **FEW, **STOCK, **CALM),
            at(*S799, **ODE, **FEW, **STOCK, **CALM),
            at(*S799, **ODE, **FEW, **STOCK),
            at(499, 249, **ODE, **FEW, **STOCK, **CALM),
            *(at(*s, **ODE, **FEW) for s in (S699, S999)),
        ],
        (0, 1, 2),
    ),
    "coloured": Series(
        "C",
        [
            at(*S999, **ODE, **FEW, **SLOW),
            at(399),
            at(*S999, **ODE),
            at(*S999, **ODE, **SLOW),
            at(999, 499, **ODE, **FEW, **SLOW),
        ],
    ),
    "schedule": Series(
        "M",
        [
            at(399),
            *(at(*s) for s in (S999, S699, (699, 499, 299, 149), S499, (499, 399, 249, 99))),
            *(at(*s) for s in ((999, 499), (699, 349), (499, 249))),
            *(at(*s, **ODE) for s in (S999, S699, S499, (999, 499), (699, 349))),
        ],
    ),
    "pairs": Series(
        "M",
        [
            at(399, **FEW),
            at(*S699, **FEW),
            *(at(*s, **FEW, **ODE, way=PairsAtTheStart) for s in (S999, S699)),
            *(at(*s, **FEW, **ODE) for s in (S999, S699, S499, (999, 499), (699, 349))),
            at(999, 874, 749, 624, 499, 374, 249, 124, **FEW, **ODE),
        ],
    ),
    "way": Series(
        "M",
        [
            *(at(*s, **ODE, way=Anchored) for s in (S999, S699)),
            *(at(*s, way=MatchedBelow) for s in (S999, S699)),
            at(*S699, way=Pulled),
            at(*S999, way=LastAlone),
            at(*S999, **ODE, way=LastAlone),
            at(*S999, **ODE, way=MatchedBelow),
        ],
    ),
}


class Runs(NamedTuple):
    """Runs on one testbed."""

    name: str
    bed: Testbed
    pairs: Pairs

    @classmethod
    def on(cls, name: str, bed: Testbed) -> "Runs":
        """With pairs of a teacher sampled as what students are held against is."""
        gen, count = generator(CPU, 0, "few steps", "pairs"), COMMON["pairs"]
        row = bed.conditions.rows(count, gen)
        z = randn((count, *bed.network.shape), gen)
        condition = bed.conditions.take(row, CPU)
        image = sample_teacher(
            bed.network, z, condition, SAMPLER, SAMPLER_STEPS, COMMON["guidance"]
        )
        return cls(name, bed, pairs_of(z, image, row))

    def run(self, row: Row, seed: int) -> Row:
        """One run, as a line of the results."""
        told = {key: value for key, value in row.items() if key in Config.model_fields}
        config = make_config(BASES[self.name] | told | {"seed": seed}, "a row")
        steps = BUDGETS[self.name] // cost_of_update(config, row["way"])
        config = config.model_copy(update={"steps": steps})
        loaded = replace(self.bed.loaded, network=self.bed.network.copy())
        counted = count_evaluations(loaded.network.module)
        state = WAYS[row["way"]](
            make_roles(loaded.network, config),
            student_recipe(loaded, config),
            self.bed.conditions,
            config,
        )
        for step in range(steps):
            state.iteration(step, self.pairs if config.needs_pairs else None)
        cost = sum(counted)
        with state.ema.swapped_in():
            last = self.bed.measure(state.roles.student.network, state.recipe)
        return {
            "bed": self.name,
            "row": row,
            "seed": seed,
            "steps": steps,
            "cost": cost,
            "first": self.bed.measure(self.bed.network, state.recipe).distance,
            "last": last.distance,
            "diversity": last.diversity,
        }


def cost_of_update(config: Config, way: str) -> int:
    """Network evaluations of an update of the student and its critic's, in the mean."""
    steps, guided = len(config.timesteps), 1 if config.guidance == 1 else 2
    before = steps - 1 if way == "LastAlone" else (steps - 1) / 2
    student = before + 3 + guided + 1
    critic = 3 * config.critic_updates + (config.critic_updates - 1) * (before + 1)
    anchor = 5 * guided + 3 if way == "Anchored" else 0
    is_at_the_end = config.sampler == "deterministic" and way != "PairsAtTheStart"
    pair = 3 + (steps - 1 if is_at_the_end else 0)
    return round(
        config.batch_size * (student + critic + anchor)
        + config.pair_batch_size * (pair if config.regression_weight else 0)
    )


def key_of(line: Row) -> str:
    return json.dumps([line["bed"], line["row"], line["seed"]], sort_keys=True)


def results(file: Path) -> dict[str, Row]:
    """Lines of the file by their key."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {key_of(line): line for line in map(json.loads, lines)}


def wanted(only: list[str]) -> Iterator[Row]:
    """Bed, row and seed of all runs, the first seed of a series before its second."""
    for name, series in SERIES.items():
        for seed in series.seeds if name in only or not only else ():
            for row in series.rows:
                yield {"bed": series.bed, "row": row, "seed": seed}


def table(name: str, done: dict[str, Row]) -> str:
    """Markdown: a row's mean over the seeds that are there, then each seed's."""
    series = SERIES[name]
    lines = [
        f"### {name} ({series.bed})\n",
        "| | updates | cost | first FD | last FD | each seed | diversity |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in series.rows:
        keys = [key_of({"bed": series.bed, "row": row, "seed": seed}) for seed in series.seeds]
        found = [done[key] for key in keys if key in done]
        if not found:
            continue
        steps, cost, first, last, diversity = (
            statistics.mean(one[column] for one in found)
            for column in ("steps", "cost", "first", "last", "diversity")
        )
        each = ", ".join(f"{one['last']:.2f}" for one in found)
        said = ", ".join(str(v) for k, v in row.items() if v != "Distillation")
        lines.append(
            f"| {said} | {steps:.0f} | {cost:,.0f} | {first:.2f} | {last:.2f} | {each} "
            f"| {diversity:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], choices=SERIES, metavar="SERIES")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/few-steps")
    parser.add_argument("--tables", action="store_true", help="print what is there, run nothing")
    asked = parser.parse_args()
    file = asked.folder / "results.jsonl"
    if asked.tables:
        print("\n\n".join(table(name, results(file)) for name in asked.only or SERIES))
        return
    torch.set_num_threads(1)
    asked.folder.mkdir(parents=True, exist_ok=True)
    beds = {"M": testbed_m, "C": testbed_c}
    runs = cache(lambda name: Runs.on(name, beds[name](asked.folder / name)))
    for line in wanted(asked.only):
        if key_of(line) in results(file):
            continue
        made = runs(line["bed"]).run(line["row"], line["seed"])
        with file.open("a") as lines:
            lines.write(json.dumps(made) + "\n")
        print(f"{made['row']}: {made['first']:.2f} -> {made['last']:.2f}", flush=True)


if __name__ == "__main__":
    main()
