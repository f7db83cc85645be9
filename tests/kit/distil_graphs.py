"""DMD Distill in a graph, on the embedded teacher and on tiny Stable Diffusion ones."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from kit.checkpoints import tiny_sd15
from kit.comfy_host import Server
from kit.command_line import run_command
from kit.graphs import (
    DIGITS_TEACHER,
    Graph,
    Node,
    failed,
    put,
    queue_lives,
)
from kit.runs import newest
from safetensors.torch import load_file, save_file

from dmd_train.networks.load import load

AUTO = "right for the model"
SHORT = {
    "critic_updates": 2,
    "pairs": 512,
    "pair_batch_size": 64,
    "checkpoint_every": 50,
    "sample_every": 100,
}
"""Settings of a digits run."""
SD = {
    "batch_size": 2,
    "micro_batch_size": 0,
    "critic_updates": 1,
    "conditioning_timestep": 999,
    "input_noise": "unit",
    "regression_weight": 0.0,
    "pair_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "gradient_checkpointing": False,
    "cpu_threads": 1,
}
PROMPTS = ["a red fox in the snow", "an old café at night", "a lighthouse"]


def distil(
    graph: Graph,
    model: Node | list[Any],
    conditions: Node | list[Any],
    *,
    preset: str = AUTO,
    steps: int = 4,
    resolution: int = 0,
    guidance: float = 0.0,
    rank: int = 0,
    seed: int = 0,
    run: str = "",
    advanced: dict[str, Any] | str = "",
    **more: Node | list[Any],
) -> Node:
    """DMD Distill, with what the page's widgets say otherwise."""
    text = advanced if isinstance(advanced, str) else yaml.safe_dump(advanced)
    return graph.add(
        "DMD_Distill",
        model=model,
        conditions=conditions,
        preset=preset,
        steps=steps,
        resolution=resolution,
        guidance=guidance,
        rank=rank,
        seed=seed,
        run=run,
        advanced=text,
        **more,
    )


def digits(graph: Graph, **settings: Any) -> Node:
    """DMD Distill on the embedded teacher."""
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)
    labels = graph.classes()
    return distil(graph, model, labels, **({"advanced": SHORT} | settings))


def run_of(server: Server, name: str) -> Path:
    return server.base / "output/dmd_runs" / name


def headless(run_yaml: Path, output: Path) -> None:
    """`python -m dmd_train train` by this very run.yaml, into another folder."""
    assert run_command("train", run_yaml, "--set", f"output={output}") == 0


def sd15(server: Server) -> str:
    """A tiny checkpoint with a text encoder, and what it says of PROMPTS, in input/."""
    name = put(server, partial(tiny_sd15, clip=True), "sd15-clip.safetensors")
    encodings = server.base / "input/sd15-prompts.safetensors"
    if not encodings.exists():
        text = load(str(server.base / "models/checkpoints" / name), torch.device("cpu"))
        assert text.text
        encoded = {k: v.half() for k, v in text.text.encode([*PROMPTS, ""]).items()}
        save_file(encoded, encodings, {"prompts": yaml.safe_dump([*PROMPTS, ""])})
    return name


def sd15_run(server: Server, graph: Graph, model: Node | None = None, **more: Any) -> Node:
    loaded = model or graph.add("CheckpointLoaderSimple", ckpt_name=sd15(server))
    told = graph.add("Probe_Prompts", name="sd15-prompts")
    settings = {"resolution": 64, "rank": 4, "advanced": SD, "negative": told[1]}
    return distil(graph, loaded, told, **(settings | more))


def learned(run: Path) -> dict[str, torch.Tensor]:
    """The adapters of student and critic after the last step."""
    state = load_file(newest(run))
    return {key: value for key, value in state.items() if "lora" in key and "@" not in key}


def distance(one: Path, other: Path) -> float:
    """Relative distance of what two runs learned: 2-norm, over the adapters' B, which were zero."""
    a, b = learned(one), learned(other)
    assert a.keys() == b.keys()
    keys = [key for key in a if "lora_B" in key]
    assert all(float(b[key].norm()) > 0 for key in keys if "student" in key)
    gap = math.hypot(*(float((a[key] - b[key]).norm()) for key in keys))
    relative = gap / math.hypot(*(float(b[key].norm()) for key in keys))
    print(f"{one.name} and {other.name}: {relative:.2e} apart")
    return relative


def failure(server: Server, graph: Graph) -> str:
    """The one line that a node ended with; the prompt after it runs."""
    message = failed(server, graph).message
    queue_lives(server)
    return message
