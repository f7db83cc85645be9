"""What makes a student learn: many small runs of the engine as one command, and their tables.

    python benchmarks/learning.py                        # what is not in the results yet
    python benchmarks/learning.py --only beta1 pairs     # of these series
    python benchmarks/learning.py --tables               # Markdown of what is there

Testbeds and what is measured: tests/kit/testbeds.py. A run is a line of results.jsonl, known by all
its settings and its seed: it is not run again, and a command that was stopped goes on. Each is a
function of its seed, up to the arithmetic of the machine. One thread.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from kit.testbeds import SAMPLER, SAMPLER_STEPS, Testbed, testbed_c, testbed_m  # noqa: E402

from dmd_train.config import Config, make_config  # noqa: E402
from dmd_train.prepare import Ready  # noqa: E402
from dmd_train.presets import PRESETS  # noqa: E402

Row = dict[str, Any]

COMMON: Row = {
    "preset": "sd15-one-step-lora",
    "device": "cpu",
    "cpu_threads": 1,
    "gradient_checkpointing": False,
    "optimizer": "adamw",
    "batch_size": 8,
    "micro_batch_size": 0,
    "warmup_steps": 0,
    "schedule": "cosine",
    "ema_decay": 0.95,
    "guidance": 1.5,
    "timesteps": [399],
    "input_noise": "unit",
    "beta1": 0.9,
    "regression_weight": 0.0,
    "regression_warmup_steps": 0,
    "regression_loss": "mse",
    "pairs": 64,
    "pair_batch_size": 8,
    "pair_sampler": SAMPLER,
    "pair_steps": SAMPLER_STEPS,
    "checkpoint_every": 10**9,
    "sample_every": 10**9,
}
BASES: dict[str, Row] = {
    "M": COMMON
    | {"steps": 150, "learning_rate": 3e-3, "lora_rank": 8, "lora_alpha": 8.0}
    | {"critic_updates": 5},
    "C": COMMON
    | {"steps": 60, "learning_rate": 2e-3, "lora_rank": 16, "lora_alpha": 16.0}
    | {"critic_updates": 2},
}

STOCK: Row = {"timesteps": [499], "input_noise": "sigma"}
"""What a stock KSampler draws exactly."""

FEW: Row = {"regression_weight": 2.0}
"""64 pairs, kept on."""


def each_cost(settings: Row) -> int:
    """Evaluations of one iteration: the student's update, then the critic's."""
    matching = 3 + 2 + 1
    critic = 3 + 4 * (settings["critic_updates"] - 1)
    regression = 3 * settings["pair_batch_size"] if settings["regression_weight"] else 0
    return (matching + critic) * settings["batch_size"] + regression


def at_equal_cost(bed: str, row: Row) -> Row:
    """The row with as many steps as cost what the testbed's own take."""
    base = BASES[bed]
    regression = {"regression_weight": row.get("regression_weight", 0.0)}
    steps = base["steps"] * each_cost(base | regression) / each_cost(base | row)
    return row | {"steps": round(steps)}


@dataclass(frozen=True)
class Series:
    """Rows that are held against each other, each with all seeds."""

    bed: str
    rows: list[Row]
    seeds: tuple[int, ...] = (0, 1)


T, NOISE = "timesteps", "input_noise"
ALONE: Row = {"regression_warmup_steps": 10**6}
"""The whole run on pairs alone."""

CALM: Row = {"beta1": 0.0}

SERIES: dict[str, Series] = {
    "timestep": Series("M", [{T: [399]}, {T: [499]}, STOCK, {T: [999]}]),
    "beta1": Series("M", [STOCK, STOCK | CALM, STOCK | FEW, STOCK | FEW | CALM]),
    "pairs": Series(
        "M",
        [
            STOCK,
            *(STOCK | FEW | {"pairs": pairs} for pairs in (64, 256)),
            *(STOCK | FEW | ALONE | {"pairs": pairs} for pairs in (64, 256)),
            STOCK | {"pairs": 256, "regression_warmup_steps": 75},
        ],
    ),
    "coloured": Series(
        "C",
        [{T: [399]}, STOCK, {T: [999]}, STOCK | FEW, STOCK | FEW | CALM, STOCK | CALM],
        (0,),
    ),
    "coloured again": Series("C", [STOCK | FEW, STOCK | FEW | CALM], (1,)),
    "loss": Series("M", [STOCK | FEW, STOCK | FEW | {"regression_loss": "pseudo-huber"}], (0,)),
    "guidance": Series(
        "M",
        [{"guidance": g} | row for g in (3.0, 7.5) for row in (STOCK | FEW, STOCK, {T: [399]})],
        (0,),
    ),
    "critic updates": Series(
        "M",
        [
            at_equal_cost("M", STOCK | few | {"critic_updates": n})
            for few in (FEW, {})
            for n in (1, 2, 5, 10)
        ],
        (0,),
    ),
    "matching guidance": Series(
        "M", [STOCK | few | {"matching_guidance": 1.2} for few in ({}, FEW)]
    ),
    "weight": Series("M", [STOCK | {"regression_weight": w} for w in (0.25, 2.0, 8.0)], (0,)),
    "critic": Series(
        "M",
        [
            STOCK,
            *(STOCK | {"towards_student": share} for share in (0.01, 0.05)),
            *(STOCK | {"critic_rate": factor} for factor in (0.3, 3.0)),
            STOCK | {"head_start": 30},
        ],
        (0,),
    ),
    "range": Series("M", [STOCK | {"t_max": t} for t in (980, 700, 500)], (0,)),
    "batch": Series("M", [STOCK | FEW | {"batch_size": b} for b in (1, 2, 4, 8)], (0,)),
    "rank": Series(
        "M", [STOCK | FEW | {"lora_rank": r, "lora_alpha": float(r)} for r in (2, 8, 32)], (0,)
    ),
    "other timesteps": Series(
        "M",
        [*({T: [t]} for t in (249, 599, 749)), *({T: [t], NOISE: "sigma"} for t in (399, 599))],
        (0,),
    ),
    "many pairs": Series("M", [STOCK | FEW | more | {"pairs": 1024} for more in ({}, ALONE)], (0,)),
}


def set_matching_guidance(ready: Ready, guidance: float) -> None:
    """Of the teacher in matching; pairs and what is measured keep the target's."""
    ready.state.distribution_matching.guidance = guidance


def set_critic_rate(ready: Ready, factor: float) -> None:
    """The critic's learning rate, over the student's."""
    critic = ready.state.critic
    rate = critic.config.learning_rate * factor
    critic.config = critic.config.model_copy(update={"learning_rate": rate})


def set_head_start(ready: Ready, updates: int) -> None:
    """Critic updates before the student's first."""
    state = ready.state
    for update in range(updates):
        state._denoise(state._draw(state.denoising, -1, f"head start {update}"))
        state.critic.update(0)


def set_towards_student(ready: Ready, share: float) -> None:
    """After each update of the student the critic is pulled to it (SenseFlow's IDA)."""
    student, critic = ready.state.student, ready.state.critic
    update, pairs = student.update, list(zip(student.parameters, critic.parameters, strict=True))

    def pulling(step: int) -> torch.Tensor:
        norm = update(step)
        with torch.no_grad():
            for own, other in pairs:
                critic.parameters[other].lerp_(student.parameters[own], share)
        return norm

    student.update = pulling  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[Ready, Any], None]] = {
    "matching_guidance": set_matching_guidance,
    "critic_rate": set_critic_rate,
    "head_start": set_head_start,
    "towards_student": set_towards_student,
}
"""What is no setting of the engine, tried on a run that is ready."""


def settings_of(bed: str, row: Row, seed: int) -> Row:
    """Raises ValueError where the preset would have a say, and a change of it change the row."""
    settings = BASES[bed] | row | {"seed": seed}
    if unsaid := PRESETS[settings["preset"]].settings.keys() - settings.keys() - {"training"}:
        raise ValueError(f"COMMON does not say {', '.join(unsaid)}")
    return settings


def key_of(bed: str, settings: Row) -> str:
    return json.dumps([bed, settings], sort_keys=True)


def run(testbed: Testbed, bed: str, settings: Row) -> Row:
    """One run, as a line of the results."""

    def change(ready: Ready) -> None:
        for name, value in settings.items():
            if name in CHANGES:
                CHANGES[name](ready, value)

    with tempfile.TemporaryDirectory() as folder:
        told = {key: value for key, value in settings.items() if key in Config.model_fields}
        if "regression_warmup_steps" in told:
            told["regression_warmup_steps"] = min(told["regression_warmup_steps"], told["steps"])
        config = make_config(told | {"teacher": bed, "output": f"{folder}/run"}, "a row")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        learned = testbed.distil(config, change)
        seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    numbers = {
        "first": learned.first.distance,
        "last": learned.last.distance,
        "diversity": learned.last.diversity,
        "cost": learned.cost,
        "cpu_seconds": round(seconds, 1),
    }
    return {"bed": bed, "settings": settings} | numbers


def results(file: Path) -> dict[str, Row]:
    """Lines of the file by their key; a line that a kill cut off is left out."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[key_of(row["bed"], row["settings"])] = row
    return found


def wanted(only: list[str]) -> Iterator[tuple[str, Row]]:
    """Beds and settings of all runs, the first seed of a series before its second."""
    for name, series in SERIES.items():
        if only and name not in only:
            continue
        for seed in series.seeds:
            for row in series.rows:
                yield series.bed, settings_of(series.bed, row, seed)


def table(name: str, done: dict[str, Row]) -> str:
    """Markdown: a row's mean over the seeds that are there, then each seed's."""
    series = SERIES[name]
    lines = [
        f"### {name} ({series.bed})\n",
        "| | first FD | last FD | each seed | diversity | cost |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in series.rows:
        keys = [key_of(series.bed, settings_of(series.bed, row, seed)) for seed in series.seeds]
        found = [done[key] for key in keys if key in done]
        if not found:
            continue
        first, last, diversity, cost = (
            statistics.mean(one[column] for one in found)
            for column in ("first", "last", "diversity", "cost")
        )
        each = ", ".join(f"{one['last']:.2f}" for one in found)
        said = ", ".join(f"{key} {value}" for key, value in row.items())
        lines.append(
            f"| {said} | {first:.2f} | {last:.2f} | {each} | {diversity:.2f} | {cost:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], choices=SERIES, metavar="SERIES")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learning")
    parser.add_argument("--tables", action="store_true", help="print what is there, run nothing")
    asked = parser.parse_args()
    file = asked.folder / "results.jsonl"
    if asked.tables:
        print("\n\n".join(table(name, results(file)) for name in asked.only or SERIES))
        return
    torch.set_num_threads(1)
    asked.folder.mkdir(parents=True, exist_ok=True)
    beds = {"M": testbed_m, "C": testbed_c}
    testbed = cache(lambda bed: beds[bed](asked.folder / bed))
    for bed, settings in wanted(asked.only):
        if key_of(bed, settings) in results(file):
            continue
        row = run(testbed(bed), bed, settings)
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        differs = {k: v for k, v in settings.items() if BASES[bed].get(k) != v}
        print(f"{bed} {differs}: {row['first']:.2f} -> {row['last']:.2f}", flush=True)


if __name__ == "__main__":
    main()
