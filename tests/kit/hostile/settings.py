"""run.yaml and what `--set` says: YAML that is none, and settings of wrong values."""

from pathlib import Path
from random import Random
from typing import Any

import yaml
from kit.command_attempt import Attempt
from kit.hostile.values import CONTROL, plain, strange

RUN = {
    "teacher": "digits",
    "output": "run",
    "steps": 4,
    "batch_size": 2,
    "pairs": 12,
    "pair_batch_size": 4,
    "pair_steps": 2,
    "critic_updates": 1,
    "checkpoint_every": 2,
    "sample_every": 4,
}
SD_RUN = RUN | {
    "preset": "sd15-one-step-lora",
    "lora_rank": 1,
    "steps": 1,
    "batch_size": 1,
    "pairs": 1,
    "pair_batch_size": 1,
    "pair_steps": 1,
    "regression_weight": 0,
    "sample_every": 1,
    "checkpoint_every": 1,
    "resolution": 64,
    "device": "cpu",
}

NASTY_YAML = (
    "a: &a [x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\n"
    "f: &f [*e,*e,*e,*e,*e,*e,*e,*e]\nteacher: [*f,*f,*f,*f,*f,*f,*f,*f]\noutput: run\n",
    "&a\nteacher: *a\noutput: run\n",
    "steps: 1\nsteps: 2\nteacher: digits\noutput: run\n",
    "steps: " + "9" * 5000,
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000,
    "? " * 3000,
    "!!python/object/apply:os.system ['touch executed']",
    "teacher: !!python/object/apply:os.system ['touch executed']",
    "--- a\n--- b\n",
    "\ufeffteacher: digits\n",
    "a" * 2_000_000,
    "'" * 10,
    "\t\tx: 1",
    "%YAML 9.9\n---\nx: 1",
    "x: !foo bar",
    "<<: [1]",
    "? [a]\n: b\n",
    "null",
    "42",
    "~: ~",
    "{}",
)
NASTY_VALUES = (
    "2024-99-99",
    "2024-01-01",
    "2024-01-01 00:00:00",
    "!!int x",
    "!!int ''",
    "!!float x",
    "!!bool x",
    "!!timestamp abc",
    "!!binary '???'",
    "!!set {a}",
    "!!omap [a]",
    "!!python/name:os.system",
    "!!python/object/apply:os.system ['touch executed']",
    "9" * 5000,
    "1e999",
    ".inf",
    ".nan",
    "-.inf",
    "0x" + "f" * 5000,
    "1:2:3:4",
    "[" * 2000,
    "&a [*a]",
    "[*x]",
    "{a: b",
    "'\\x1b[31m'",
    '"\\e[31m\\r\\n\\0"',
    '"\\ud800"',
    "|\n  a\n  b",
    "nul",
    "CON",
    ".",
    "..",
    "''",
    "/",
    "x" * 300,
    "x" * 100_000,
    "~",
    "yes",
    "[yes, no]",
    "{a: 1}",
    "-0",
    "1_000",
    "010",
    "0o7",
    "1" * 400,
    "-1",
    "0",
    "1e12",
    "1000000000000",
    "9223372036854775808",
)
SETTINGS = (
    "teacher",
    "prompts",
    "output",
    "preset",
    "seed",
    "device",
    "cpu_threads",
    "precision",
    "training",
    "lora_rank",
    "lora_alpha",
    "resolution",
    "optimizer",
    "steps",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "clip_norm",
    "ema_decay",
    "critic_updates",
    "guidance",
    "t_min",
    "t_max",
    "timesteps",
    "regression_weight",
    "regression_warmup_steps",
    "regression_loss",
    "pairs",
    "pair_batch_size",
    "pair_sampler",
    "pair_steps",
    "decoder",
    "checkpoint_every",
    "sample_every",
    "trackers",
    "stepz",
)


def write_settings(folder: Path, values: dict[str, Any]) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(values))


def sd_run(pipeline: Path) -> dict[str, Any]:
    return SD_RUN | {"teacher": str(pipeline), "prompts": str(pipeline / "prompts.txt")}


def run_yaml(random: Random, folder: Path) -> Attempt:
    text = yaml.safe_dump(RUN)
    match random.randrange(4):
        case 0:
            text = random.choice(NASTY_YAML)
        case 1:
            key = random.choice(SETTINGS)
            lines = [line for line in text.splitlines() if not line.startswith(f"{key}:")]
            text = "\n".join([*lines, f"{key}: {random.choice(NASTY_VALUES)}"])
        case 2:
            values = RUN | {random.choice(SETTINGS): plain(strange(random))}
            text = yaml.safe_dump(values)
        case 3:
            data = bytearray(text.encode())
            for _ in range(random.randrange(1, 6)):
                data[random.randrange(len(data))] = random.randrange(256)
            (folder / "run.yaml").write_bytes(data)
            return Attempt(["train", "run.yaml"], ("run/", "run"))
    (folder / "run.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    return Attempt([random.choice(["train", "plan", "pairs"]), "run.yaml"], ("run/", "run"))


def changes(random: Random, folder: Path) -> Attempt:
    write_settings(folder, RUN)
    key, value = random.choice(SETTINGS), random.choice(NASTY_VALUES)
    change = random.choice([f"{key}={value}"] * 8 + [key, f"={value}", f"{CONTROL}=1", "a.b=1"])
    command = random.choice(["train", "plan", "pairs"])
    return Attempt([command, "run.yaml", "--set", change[:100_000]], ("run/", "run"))
