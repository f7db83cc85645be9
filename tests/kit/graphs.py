"""Prompts in API form, built as a user wires them, and what comes out of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from kit.checkpoints import as_diffusers_unet
from kit.comfy_host import PromptFailed, Server
from kit.probe_nodes import condition, pooled_condition
from safetensors.torch import load_file
from torch import Tensor

SEED = 7
DIGITS_TEACHER = "dmd_students/digits-teacher.safetensors"
DIGITS_STUDENT = "dmd_students/digits-one-step.safetensors"
"""Names in the list of Load DMD Checkpoint."""
LATENT_SCALE = {"sd15": 0.18215, "sd2": 0.18215, "sd2v": 0.18215, "sdxl": 0.13025}
"""A LATENT of ComfyUI's is what the VAE takes; a network works on one that is this much smaller."""
CONTEXT = {"sd15": (768, 0), "sd2": (1024, 0), "sd2v": (1024, 0), "sdxl": (2048, 1280)}
"""Width of the text condition and of the pooled one."""

_names = (f"latent-{i}" for i in count())


class Node:
    """A node of a prompt: `node[1]` is its second output; the node itself stands for its first."""

    def __init__(self, id: str) -> None:
        self.id = id

    def __getitem__(self, output: int) -> list[Any]:
        return [self.id, output]


class Graph(dict[str, Any]):
    """A prompt: node id -> class and inputs. shown: what its nodes showed when it last ran."""

    shown: dict[str, Any]

    def add(self, class_type: str, **inputs: Any) -> Node:
        wired = {
            key: value[0] if isinstance(value, Node) else value for key, value in inputs.items()
        }
        node = Node(str(len(self)))
        self[node.id] = {"class_type": class_type, "inputs": wired}
        return node

    def condition(self, family: str, seed: int = SEED) -> Node:
        """A random text condition of the family's widths."""
        width, pooled_width = CONTEXT[family]
        return self.add("Probe_Conditioning", seed=seed, width=width, pooled_width=pooled_width)

    def classes(self, labels: str = "0-9") -> Node:
        """DMD Class Label."""
        return self.add("DMD_ClassLabel", labels=labels)

    def empty(self, width: int = 64, height: int = 64, batch: int = 1) -> Node:
        return self.add("EmptyLatentImage", width=width, height=height, batch_size=batch)

    def ksampler(
        self,
        model: Node | list[Any],
        positive: Node,
        latent: Node,
        *,
        steps: int = 1,
        sampler: str = "lcm",
        scheduler: str = "simple",
        negative: Node | None = None,
        cfg: float = 1.0,
        seed: int = SEED,
        denoise: float = 1.0,
    ) -> Node:
        """The stock KSampler."""
        return self.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=negative or positive,
            latent_image=latent,
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name=sampler,
            scheduler=scheduler,
            denoise=denoise,
        )

    def one_step(
        self,
        model: Node | list[Any],
        positive: Node,
        width: int = 64,
        height: int = 64,
        batch: int = 1,
        **more: Any,
    ) -> Node:
        """DMD One-Step Sampler."""
        return self.add(
            "DMD_OneStepSampler",
            model=model,
            positive=positive,
            seed=SEED,
            width=width,
            height=height,
            batch_size=batch,
            **more,
        )

    def sampler_custom(
        self, model: Any, sampler: Any, sigmas: Any, positive: Node, latent: Node
    ) -> Node:
        """The stock SamplerCustom with noise of its own."""
        return self.add(
            "SamplerCustom",
            model=model,
            sampler=sampler,
            sigmas=sigmas,
            positive=positive,
            negative=positive,
            latent_image=latent,
            add_noise=True,
            noise_seed=SEED,
            cfg=1.0,
        )

    def step_noise(self, latent: Node, count: int) -> Node:
        """The noise that samplers add between steps; how it is seeded changed with a version."""
        return self.add("Probe_StepNoise", latent=latent, seed=SEED, count=count)

    def model_sampling(
        self, model: Node | list[Any], recipe: str = "from the file", timesteps: str = ""
    ) -> Node:
        return self.add("DMD_ModelSampling", model=model, recipe=recipe, timesteps=timesteps)


def sample(server: Server, graph: Graph, *latents: Node, timeout: float = 120) -> list[Tensor]:
    """Run the graph; the samples of these LATENTs, (B, C, H, W) float32."""
    names = [next(_names) for _ in latents]
    for latent, name in zip(latents, names, strict=True):
        graph.add("Probe_SaveLatent", latent=latent, name=name)
    graph.shown = server.run(graph, timeout)["outputs"]
    return [load_file(server.base / f"output/{name}.safetensors")["samples"] for name in names]


def failed(server: Server, graph: Graph) -> PromptFailed:
    """Run a graph that cannot be: what its node says, which is one line."""
    with pytest.raises(PromptFailed) as failure:
        server.run(graph)
    assert failure.value.event == "execution_error"
    assert "\n" not in failure.value.message
    return failure.value


def queue_lives(server: Server) -> None:
    """Asserts that the next prompt runs."""
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT)
    (drawn,) = sample(server, graph, graph.one_step(model, graph.classes("7"), 0, 0))
    assert torch.isfinite(drawn).all()


NO_NOISE = torch.empty(0, 4, 8, 8)
"""What `by_diffusers` is given with one step, which adds none."""


def told(graph: Graph, node: Node) -> str:
    """The line that a load node showed."""
    (line,) = graph.shown[node.id]["text"]
    return str(line)


def put(server: Server, make: Callable[[Path], None], name: str = "") -> str:
    """Build a checkpoint where the server looks for them, once; its name there."""
    name = name or f"{make.__name__}.safetensors"
    path = models(server, "checkpoints", name)
    if not path.exists():
        make(path)
    return name


@cache
def unet_of(checkpoint: Path) -> UNet2DConditionModel:
    """The weights of a checkpoint made here, as a network of diffusers'."""
    return as_diffusers_unet(checkpoint)


def models(server: Server, folder: str, name: str) -> Path:
    """Where a model file of this name belongs."""
    path = server.base / "models" / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def noise(*shape: int, seed: int = SEED) -> Tensor:
    """What every sampler of ComfyUI starts from, for this seed and this shape of latent."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_diffusers(
    unet: UNet2DConditionModel,
    family: str,
    timesteps: list[int],
    start: Tensor,
    between: Tensor,
) -> Tensor:
    """What diffusers' LCMScheduler makes of these weights, as a LATENT of ComfyUI's.

    start: (B, 4, H, W) ~ N(0, I); between: Graph.step_noise, of every step but the last, or more.
    """
    width, pooled_width = CONTEXT[family]
    batch, _, high, wide = start.shape
    added = None
    if pooled_width:
        sizes = torch.tensor([[8.0 * high, 8.0 * wide, 0, 0, 8.0 * high, 8.0 * wide]])
        pooled = pooled_condition(SEED, pooled_width).expand(batch, -1)
        added = {"text_embeds": pooled, "time_ids": sizes.expand(batch, -1)}
    # the defaults are Stable Diffusion's schedule
    scheduler = LCMScheduler(prediction_type="v_prediction" if family == "sd2v" else "epsilon")
    scheduler.set_timesteps(timesteps=timesteps)
    text = condition(SEED, width).expand(batch, -1, -1)
    x = start
    for t, after, eps in zip_longest(
        scheduler.timesteps, scheduler.timesteps[1:], between.split(batch)[: len(timesteps) - 1]
    ):
        output = unet(x, t, text, added_cond_kwargs=added).sample
        x0: Tensor = scheduler.step(output, t, x).denoised
        if after is not None:
            x = scheduler.add_noise(x0, eps, after[None])
    return x0 / LATENT_SCALE[family]


def error(sampled: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm."""
    assert sampled.shape == expected.shape
    return float((sampled - expected).norm() / expected.norm())
