"""Nothing learned changed: the same runs at two commits, compared bit for bit.

    python benchmarks/same_weights.py FIRST LAST [--demo-steps 1500]

Each commit is checked out into a temporary folder and trains there on one thread, by its public
doors alone: `python -m dmd_train train`, and DMD Distill in a ComfyUI server. What they are given
(tiny checkpoints of random weights, prompts, run.yaml) is made once, by the tree of this file.
Compared are all tensors and the metadata (which may have grown) of student.safetensors and of the
last checkpoint, which holds parameters, moving average and the optimisers' state. Two of the runs
are also begun at FIRST, stopped, and continued at LAST; they must end as the whole one at FIRST,
also where a preset's defaults have changed in between (then the others differ).
Exit status 1 where anything differs.
"""

import argparse
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import yaml  # noqa: E402
from graph import PROMPTS, graph_of, sd15  # noqa: E402
from kit.comfy_host import PROBE_NODES, Server  # noqa: E402
from kit.sd_files import micro_pipeline  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch import Tensor  # noqa: E402

SMALL: dict[str, Any] = {
    "device": "cpu",
    "cpu_threads": 1,
    "resolution": 64,
    "steps": 5,
    "batch_size": 2,
    "micro_batch_size": 1,
    "critic_updates": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "pairs": 4,
    "pair_batch_size": 2,
    "pair_steps": 2,
    "checkpoint_every": 2,
    "sample_every": 10**6,
}
SD15 = SMALL | {"teacher": "sd15.safetensors"}
SDXL = SMALL | {"teacher": "sdxl", "regression_warmup_steps": 2, "lora_rank": 4}
DEMO = "digits demo"
HEADLESS: dict[str, dict[str, Any]] = {
    DEMO: {"teacher": "digits", "preset": "digits-one-step"},
    "sd15 lora": SD15 | {"preset": "sd15-one-step-lora", "regression_weight": 0.25},
    "sd15 full": SD15 | {"preset": "sd15-one-step-full"},
    "sdxl pairs": SDXL | {"preset": "sdxl-one-step-lora"},
}
CONTINUED = ("sd15 lora", "sdxl pairs")
CANVAS = {"digits": 60, "SD 1.5": 4}
"""Student updates, by the name that benchmarks/graph.py has for a graph."""

Pair = tuple[str, Path, Path]
"""A title, and two run folders that must hold the same."""


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """The tree of a commit in `folder`, and out of git's list again."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def command(run_yaml: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "dmd_train", "train", str(run_yaml), "--set", f"output={run}"]


def train(tree: Path, run_yaml: Path, run: Path) -> None:
    """To the end, from its newest checkpoint where there is one."""
    subprocess.run(command(run_yaml, run), cwd=tree, check=True, stdout=subprocess.DEVNULL)


def begin(tree: Path, run_yaml: Path, run: Path) -> None:
    """Until Ctrl-C, which comes once the first checkpoint is there."""
    arguments = command(run_yaml, run)
    with subprocess.Popen(arguments, cwd=tree, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(run.glob("checkpoints/step-*")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    if process.returncode != 128 + signal.SIGINT:
        raise RuntimeError(f"{run.name} ended with {process.returncode} before it was stopped")


def from_terminal(first: Path, last: Path, base: Path, demo_steps: int) -> Iterator[Pair]:
    """Every run of HEADLESS as it is done, and those of CONTINUED."""
    teachers = base / "models/checkpoints"
    micro_pipeline(teachers / "sdxl", "sdxl")
    prompts = teachers / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    for title, settings in HEADLESS.items():
        told = {"output": "given by the command"} | settings
        if title == DEMO:
            told |= {"steps": demo_steps}
        else:
            told |= {"teacher": str(teachers / settings["teacher"]), "prompts": str(prompts)}
        run_yaml, runs = teachers / f"{title}.yaml", base / title
        run_yaml.write_text(yaml.safe_dump(told))
        for tree in (first, last):
            train(tree, run_yaml, runs / tree.name)
        yield title, runs / first.name, runs / last.name
        if title in CONTINUED:
            begin(first, run_yaml, runs / "begun")
            train(last, run_yaml, runs / "begun")
            yield f"{title}, begun before", runs / "begun", runs / first.name


def on_canvas(first: Path, last: Path, base: Path) -> Iterator[Pair]:
    """Every graph of CANVAS, all of a commit's in one server."""
    for tree in (first, last):
        with Server([PROBE_NODES], pack=tree, base=base) as server:
            for title, steps in CANVAS.items():
                server.run(graph_of(title, steps, f"{title} {tree.name}"), timeout=600)
    for title in CANVAS:
        one, other = (base / f"output/dmd_runs/{title} {tree.name}" for tree in (first, last))
        yield f"{title} on the canvas", one, other


def results(run: Path) -> dict[str, Path]:
    return {
        "student": run / "student.safetensors",
        "last checkpoint": max(run.glob("checkpoints/step-*.safetensors")),
    }


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in list(opened.keys())}, opened.metadata()


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two values; inf where the tensors are of other kinds."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return math.inf
    return float((one.double() - other.double()).abs().max())


def is_same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit: NaN equals NaN, 0 is not -0."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def compare(title: str, one: Path, other: Path) -> bool:
    """Print a row for each file of two runs; whether all are equal."""
    verdicts = []
    for name, file in results(one).items():
        (a, told_a), (b, told_b) = read(file), read(results(other)[name])
        both = a.keys() & b.keys()
        if a.keys() != b.keys():
            verdict = "NO, other names"
        elif not all(is_same(a[key], b[key]) for key in both):
            verdict = "NO"
        else:
            verdict = "yes" if told_a.items() <= told_b.items() else "NO, other metadata"
        largest = max((distance(a[key], b[key]) for key in both), default=math.inf)
        print(f"{title:28}  {name:15}  {len(both):7}  {largest:18.3g}  {verdict}", flush=True)
        verdicts.append(verdict)
    return set(verdicts) == {"yes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("first", metavar="FIRST", help="a commit")
    parser.add_argument("last", metavar="LAST", help="another")
    parser.add_argument("--demo-steps", type=int, default=1500)
    asked = parser.parse_args()

    with (
        tempfile.TemporaryDirectory() as name,
        checkout(asked.first, Path(name, "first")) as first,
        checkout(asked.last, Path(name, "last")) as last,
    ):
        base = Path(name, "comfyui")
        sd15(base)
        print(f"{'run':28}  {'file':15}  tensors  largest difference  equal", flush=True)
        pairs = chain(
            from_terminal(first, last, base, asked.demo_steps), on_canvas(first, last, base)
        )
        equal = [compare(*pair) for pair in pairs]
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
