"""What the engine adds to the network calls that DMD needs anyway.

    python benchmarks/engine.py [--device cuda] [--batch 16] [--size 32] [--rounds 7]

One iteration is one student update and five critic updates, on a class-conditional UNet2DModel of
about 3 million parameters. Its seconds, over the seconds of the bare calls (forward and backward)
timed alone in the same process, round by round, so that a noisy machine disturbs both alike.
"""

import argparse
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from dmd_train.config import make_config  # noqa: E402
from dmd_train.data.conditions import Classes  # noqa: E402
from dmd_train.iteration import Distillation  # noqa: E402
from dmd_train.method.recipe import Recipe  # noqa: E402
from dmd_train.method.roles import three_networks  # noqa: E402
from dmd_train.networks.edm import EDMNetwork  # noqa: E402
from dmd_train.networks.edm_unet import edm_unet  # noqa: E402


def build(size: int, device: torch.device) -> EDMNetwork:
    network = edm_unet(
        classes=10,
        sample_size=size,
        in_channels=3,
        out_channels=3,
        block_out_channels=(48, 96, 96),
        layers_per_block=2,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    network.module.to(device)
    return network


def bare_calls(network: EDMNetwork, batch: int, critic_updates: int) -> Callable[[], None]:
    """The raw network calls of one iteration, and nothing else."""
    x = torch.randn(batch, *network.shape, device=network.device)
    c_noise = torch.zeros(batch, device=network.device)
    label = torch.zeros(batch, dtype=torch.long, device=network.device)
    module = network.module.eval()

    def forward() -> Tensor:
        output: Tensor = module(x, c_noise, label)
        return output

    def forward_backward() -> None:
        for parameter in module.parameters():
            parameter.grad = None
        forward().square().mean().backward()

    def iteration() -> None:
        forward_backward()  # student
        with torch.no_grad():
            forward()  # teacher
            forward()  # critic, for the same x_t
        for update in range(critic_updates):
            if update > 0:
                with torch.no_grad():
                    forward()  # fresh student samples
            forward_backward()  # critic

    return iteration


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall clock on a GPU; on the CPU this process's own time, whatever else the machine does."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Peak of the device's memory on a GPU, else of this process's resident memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(1)

    network = build(args.size, device)
    settings = {"teacher": "digits", "output": "unused", "regression_weight": 0}
    config = make_config(settings | {"batch_size": args.batch}, "benchmark")
    recipe = Recipe(
        family=network.family,
        prediction="edm",
        timesteps=(999,),
        noise_scale=80,
        teacher="random weights",
        teacher_sha256="",
        license="",
    )
    state = Distillation(three_networks(network), recipe, Classes(10), config)
    bare = bare_calls(state.roles.critic.network, args.batch, config.critic_updates)
    step = iter(range(10**6))

    def engine() -> object:
        return state.iteration(next(step), pairs=None)

    for call in (bare, engine):
        seconds(call, device)
    rounds = [(seconds(engine, device), seconds(bare, device)) for _ in range(args.rounds)]
    memory_bare, memory_engine = peak_mib(bare, device), peak_mib(engine, device)

    millions = sum(p.numel() for p in network.module.parameters()) / 1e6
    print(f"{millions:.2f} M parameters, batch {args.batch}, {args.size}x{args.size}, {device}")
    print(f"engine  {statistics.median(e for e, _ in rounds):.3f} s an iteration")
    print(f"bare    {statistics.median(b for _, b in rounds):.3f} s")
    ratio = statistics.median(e / b for e, b in rounds)
    print(f"ratio   {ratio:.3f} (median of {len(rounds)} rounds)")
    print(f"peak    {memory_engine:.0f} MiB engine, {memory_bare:.0f} MiB bare calls")


if __name__ == "__main__":
    main()
