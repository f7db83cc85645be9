"""Peak memory of one frozen network with two adapters beside three full networks.

    python benchmarks/memory.py [--unet half|sd15|sdxl] [--pixels 64] [--device cuda]

Random weights of the real layout (half: SD 1.5 at half the widths, which fits a small machine three
times). Each way runs in a process of its own: three iterations, as `plan` measures, then seven
more. On a GPU the peak is what torch reserved; on a CPU, what the process had more than before it
built the network.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from torch import Tensor  # noqa: E402

from dmd_train.config import make_config  # noqa: E402
from dmd_train.iteration import Distillation  # noqa: E402
from dmd_train.method.network import Condition  # noqa: E402
from dmd_train.method.recipe import Recipe  # noqa: E402
from dmd_train.networks.stable_diffusion import StableDiffusion  # noqa: E402
from dmd_train.prepare import make_roles  # noqa: E402

LEVELS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
SD15: dict[str, Any] = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": LEVELS,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
UNETS: dict[str, dict[str, Any]] = {
    "half": SD15 | {"block_out_channels": (160, 320, 640, 640)},
    "sd15": SD15,
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


class RandomText:
    """Conditions of the right widths."""

    def __init__(self, width: int) -> None:
        self.text, self.pooled = torch.randn(1, 77, width), torch.randn(1, 1280)

    def rows(self, size: int, gen: torch.Generator) -> Tensor:
        return torch.zeros(size, dtype=torch.int64)

    balanced = rows

    def take(self, rows: Tensor, device: torch.device) -> Condition:
        text = {"text": self.text.expand(len(rows), -1, -1).to(device)}
        if self.text.shape[-1] == 2048:
            text["pooled"] = self.pooled.expand(len(rows), -1).to(device)
        return text


def rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(unet: str, training: str, pixels: int, device_name: str, results: Any) -> None:
    """One way, in this process: peaks in bytes, median seconds an iteration."""
    device = torch.device(device_name)
    preset = ("sdxl" if unet == "sdxl" else "sd15") + f"-one-step-{training}"
    settings = {"batch_size": 1, "micro_batch_size": 1, "critic_updates": 2}
    config = make_config(
        {"teacher": unet, "output": "unused", "preset": preset, "device": device_name, **settings},
        "benchmark",
    )
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = rss()
    with torch.device(device):
        module = UNet2DConditionModel(sample_size=64, **UNETS[unet])
    text = RandomText(UNETS[unet]["cross_attention_dim"])
    network = StableDiffusion(
        module.eval(),
        family="sdxl" if unet == "sdxl" else "sd1",
        prediction="eps",
        shape=(4, pixels // 8, pixels // 8),
        license="none",
        empty={"text": text.text.to(device)},
        half=device.type == "cuda",
        decoder=None,
        latent_scale=0.18215,
        downscale=8,
    )
    recipe = Recipe(family=network.family, prediction="eps", timesteps=(999,), noise_scale=1.0)
    state = Distillation(make_roles(network, config), recipe, text, config)

    def peak() -> int:
        return torch.cuda.max_memory_reserved() if device.type == "cuda" else rss() - before

    def iterate(steps: range) -> list[float]:
        times = []
        for step in steps:
            start = time.perf_counter()
            state.iteration(step + config.regression_warmup_steps, None)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return times

    iterate(range(3))
    planned = peak()
    seconds = statistics.median(iterate(range(3, 10)))
    trained = sum(p.numel() for p in state.roles.student.parameters.values())
    results.put({"plan": planned, "peak": peak(), "seconds": seconds, "trained": trained})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--unet", choices=list(UNETS), default="half")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=["lora", "full"])
    chosen = parser.parse_args()
    measured = {}
    context = multiprocessing.get_context("spawn")
    for training in [chosen.only] if chosen.only else ["lora", "full"]:
        results = context.Queue()
        arguments = (chosen.unet, training, chosen.pixels, chosen.device, results)
        process = context.Process(target=run, args=arguments)
        process.start()
        measured[training] = results.get()
        process.join()
        print(training, json.dumps(measured[training]), flush=True)
    if len(measured) == 2:
        ratio = measured["full"]["peak"] / measured["lora"]["peak"]
        print(f"three networks take {ratio:.2f} times the memory of one with two adapters")


if __name__ == "__main__":
    main()
