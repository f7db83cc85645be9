"""What an iteration costs in the graph, over the same iteration headless.

    python benchmarks/graph.py [--rounds 5] [--steps 200] [--sd-steps 20]

One run: a ComfyUI server trains with DMD Distill, then this process does by the run.yaml that the
node wrote, in turns. Seconds of an iteration are the medians of metrics.jsonl, which the engine
writes behind either door. The digits are the engine's own network in both; of the tiny SD 1.5, the
graph trains ComfyUI's modules and headless diffusers'.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import yaml  # noqa: E402
from kit.checkpoints import tiny_sd15  # noqa: E402
from kit.comfy_host import PROBE_NODES, Server  # noqa: E402
from kit.graphs import Graph  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from dmd_train.networks.load import load  # noqa: E402
from dmd_train.terminal import commands as cli  # noqa: E402

PROMPTS = ["a red fox in the snow", "an old lighthouse", ""]
DIGITS = {"pairs": 500, "sample_every": 10**6, "checkpoint_every": 10**6}
SD = {
    "batch_size": 2,
    "micro_batch_size": 0,
    "gradient_checkpointing": False,
    "cpu_threads": 1,
    "regression_weight": 0.0,
    "pair_steps": 2,
    "sample_every": 10**6,
    "checkpoint_every": 10**6,
}


def sd15(base: Path) -> Path:
    """A tiny checkpoint for a server of this base directory; its prompts, encoded, in input/."""
    file = base / "models/checkpoints/sd15.safetensors"
    for folder in (file.parent, base / "input"):
        folder.mkdir(parents=True, exist_ok=True)
    tiny_sd15(file, clip=True)
    text = load(str(file), torch.device("cpu")).text
    assert text
    encoded = {key: value.half() for key, value in text.encode(PROMPTS).items()}
    told = {"prompts": yaml.safe_dump(PROMPTS)}
    save_file(encoded, base / "input/prompts.safetensors", told)
    return file


def graph_of(what: str, steps: int, run: str) -> Graph:
    graph = Graph()
    widgets = {"preset": "right for the model", "steps": steps, "seed": 0, "run": run}
    widgets |= {"guidance": 0.0, "rank": 0, "resolution": 0}
    if what == "digits":
        model = graph.add("DMD_LoadCheckpoint", file="dmd_students/digits-teacher.safetensors")
        labels = graph.add("DMD_ClassLabel", labels="0-9")
        wires = {"model": model, "conditions": labels, "advanced": yaml.safe_dump(DIGITS)}
    else:
        model = graph.add("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
        prompts = graph.add("Probe_Prompts", name="prompts")
        wires = {"model": model, "conditions": prompts, "negative": prompts[1]}
        wires["advanced"] = yaml.safe_dump(SD)
        widgets |= {"resolution": 64, "rank": 16}
    graph.add("DMD_Distill", **widgets, **wires)
    return graph


def seconds(run: Path) -> float:
    """Median of an iteration, without the first ten."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds"] for row in rows[10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sd-steps", type=int, default=20)
    arguments = parser.parse_args()
    with Server([PROBE_NODES]) as server:
        sd15(server.base)
        for what, steps in (("digits", arguments.steps), ("SD 1.5", arguments.sd_steps)):
            graph, headless = [], []
            for number in range(arguments.rounds):
                folder = server.base / f"output/dmd_runs/{what} {number}"
                server.run(graph_of(what, steps, folder.name), timeout=600)
                other = server.base / f"headless {what} {number}"
                command = ["train", str(folder / "run.yaml"), "--set", f"output={other}"]
                cli.app(command, standalone_mode=False)
                graph.append(seconds(folder))
                headless.append(seconds(other))
            ratio = statistics.median(g / h for g, h in zip(graph, headless, strict=True))
            print(
                f"{what}: graph {statistics.median(graph) * 1000:.1f} ms an iteration, headless "
                f"{statistics.median(headless) * 1000:.1f} ms, ratio {ratio:.3f} "
                f"(median of {arguments.rounds} rounds)"
            )


if __name__ == "__main__":
    main()
