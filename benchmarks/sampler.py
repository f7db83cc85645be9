"""What one step costs inside a real ComfyUI server.

    python benchmarks/sampler.py [--size 512] [--rounds 5] [--teacher-size 256]

One run, one SD 1.5-layout checkpoint of random weights. From start to end of a prompt whose models
are loaded: our one-step node and decode, stock KSampler with one step and decode, over one bare
network call and decode in the same server. Then the teacher with 50 steps and cfg, network time
alone, over the student's one call. Medians over rounds that interleave the candidates.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from kit.checkpoints import tiny_sd15  # noqa: E402
from kit.comfy_host import Server  # noqa: E402

CHECKPOINT = "dmd2_1step_sd15.safetensors"  # a name that says how it is sampled

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def loaded(size: int) -> Graph:
    return {
        "load": node("DMD_LoadCheckpoint", file=f"checkpoints/{CHECKPOINT}"),
        "count": node("Bench_CountCalls", model=["load", 0]),
        "text": node("Probe_Conditioning", seed=0, width=768, pooled_width=0),
        "empty": node("EmptyLatentImage", width=size, height=size, batch_size=1),
    }


def decoded() -> Graph:
    return {
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "sink": node("Bench_Sink", image=["decode", 0]),
    }


def ours(size: int, seed: int, model: str = "load") -> Graph:
    sample = node(
        "DMD_OneStepSampler",
        model=[model, 0],
        positive=["text", 0],
        seed=seed,
        width=size,
        height=size,
        batch_size=1,
    )
    return loaded(size) | {"sample": sample} | decoded()


def stock(size: int, seed: int, steps: int, cfg: float, model: str = "load") -> Graph:
    sample = node(
        "KSampler",
        model=[model, 0],
        positive=["text", 0],
        negative=["text", 0],
        latent_image=["empty", 0],
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return loaded(size) | {"sample": sample} | decoded()


def bare(size: int, seed: int) -> Graph:
    call = node(
        "Bench_BareCall",
        model=["load", 0],
        positive=["text", 0],
        vae=["load", 2],
        size=size,
        seed=seed,
    )
    return loaded(size) | {"call": call}


def end_to_end(entry: dict[str, Any]) -> float:
    """Seconds from the start of the prompt's execution to its end."""
    times = {name: message["timestamp"] for name, message in entry["status"]["messages"]}
    return (times["execution_success"] - times["execution_start"]) / 1000


def network_time(entry: dict[str, Any]) -> dict[str, float]:
    spent: dict[str, float] = entry["outputs"]["sink"]["spent"][0]
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--teacher-size", type=int, default=256)
    args = parser.parse_args()

    packs = [ROOT / "tests/kit/probe_nodes", ROOT / "benchmarks/bench_nodes"]
    with Server(packs) as server:
        folder = server.base / "models/checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        tiny_sd15(folder / CHECKPOINT)
        for warm_up in (ours(args.size, 1), stock(args.size, 1, 1, 1.0), bare(args.size, 1)):
            server.run(warm_up, timeout=600)
        rows = []
        for seed in range(2, 2 + args.rounds):
            call = server.run(bare(args.size, seed), 600)["outputs"]["call"]["seconds"][0]
            one = end_to_end(server.run(ours(args.size, seed), 600))
            ksampler = end_to_end(server.run(stock(args.size, seed, 1, 1.0), 600))
            rows.append((call["network"] + call["decode"], one, ksampler))

        size = args.teacher_size
        student = [
            network_time(server.run(ours(size, seed, model="count"), 600)) for seed in range(3, 8)
        ]
        teacher = network_time(server.run(stock(size, 9, 50, 7.5, model="count"), 3600))

    print(f"SD 1.5 layout, one level (14 M), {args.size}x{args.size}, fp32 on CPU, batch 1")
    print(f"bare network call + decode        {statistics.median(r[0] for r in rows):.3f} s")
    for name, i in (("DMD One-Step Sampler + decode", 1), ("stock KSampler, 1 step + decode", 2)):
        seconds = statistics.median(row[i] for row in rows)
        ratio = statistics.median(row[i] / row[0] for row in rows)
        print(f"{name:33} {seconds:.3f} s, {ratio:.3f} x bare")
    one = statistics.median(spent["seconds"] for spent in student)
    print(
        f"network time at {size}x{size}: teacher, 50 steps with cfg, {teacher['images']:.0f} "
        f"evaluations, {teacher['seconds']:.2f} s; student {one:.3f} s; "
        f"ratio {teacher['seconds'] / one:.1f}"
    )


if __name__ == "__main__":
    main()
