"""Runs exported by the command line, and the ways in which ComfyUI samples them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kit.checkpoints import tiny_sd2_v, tiny_sd15, tiny_sdxl
from kit.comfy_host import Server
from kit.command_line import run_command
from kit.graphs import LATENT_SCALE, Graph, Node, error, models, noise, sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_train.networks.load import load
from dmd_train.run.sample_sheet import SampleSheet

EXACT = 1e-4
"""Relative error of a latent. Measured: 1e-7 to 1e-6."""
OFF = 0.01
"""What is another student, or none, is off by more than this. Measured: 0.09 and more."""
SEED = 3_000_000_019
PROMPT = "a red fox in the snow"
LICENSE = "CC0-1.0"
CPU = torch.device("cpu")

TINY: dict[str, Callable[..., None]] = {"sd15": tiny_sd15, "sd2v": tiny_sd2_v, "sdxl": tiny_sdxl}
SHORT = {
    "resolution": 64,
    "steps": 2,
    "batch_size": 2,
    "micro_batch_size": 0,
    "critic_updates": 1,
    "timesteps": [999],
    "input_noise": "unit",
    "regression_weight": 0.0,
    "pairs": 2,
    "pair_batch_size": 2,
    "pair_steps": 2,
    "lora_rank": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "ema_decay": 0.0,
    "precision": "fp32",
    "sample_every": 1000,
    "gradient_checkpointing": False,
    "cpu_threads": 1,
}
WARM = {"regression_warmup_steps": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "sd15": {"preset": "sd15-one-step-lora"},
    "sd15-full": {"preset": "sd15-one-step-full", "ema_decay": 0.9},
    "sd2v": {"preset": "sd2-one-step-lora", "guidance": 1.0},
    "sdxl": {"preset": "sdxl-one-step-lora", "guidance": 1.0} | WARM | {"timesteps": [399]},
    "sdxl-999": {"preset": "sdxl-one-step-lora", "guidance": 1.0} | WARM | {"steps": 1},
}
"""Run -> its settings beside SHORT. What precedes the dash is the family of its teacher."""
FAMILY = {"sd15": "sd1", "sd2v": "sd2", "sdxl": "sdxl"}
SHOWN = {"sd15": "SD 1.x", "sd2v": "SD 2.x", "sdxl": "SDXL"}
RECIPE_399 = "SDXL, 1 step (t = 399)"
FOLDERS = {"lora": "loras", "unet": "diffusion_models", "checkpoint": "checkpoints"}
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Run:
    """A trained run, and where ComfyUI looks for its files."""

    name: str
    server: Server

    @property
    def family(self) -> str:
        return self.name.partition("-")[0]

    @property
    def timestep(self) -> int:
        return 399 if self.name == "sdxl" else 999

    @property
    def says(self) -> str:
        """What Load DMD ... shows of a file of this run; {} stands for its layout."""
        licence = LICENSE if self.family == "sd15" else "unknown"
        return f"{SHOWN[self.family]}, {{}}: 1 step at t = {self.timestep}; licence {licence}"

    @property
    def folder(self) -> Path:
        return self.server.base / "runs" / self.name

    @property
    def teacher(self) -> Path:
        return models(self.server, "checkpoints", f"{self.family}-whole.safetensors")

    @property
    def condition(self) -> dict[str, Tensor]:
        """This package's text encoding of PROMPT."""
        return load_file(self.server.base / f"input/{self.family}-prompt.safetensors")

    @property
    def teachers_latent(self) -> Tensor:
        """One step of the teacher, where the student makes one."""
        return load_file(self.teacher.with_suffix(".latents"))[str(self.timestep)]

    def export(self, form: str, dtype: str = "fp16") -> Path:
        """Written by the command line into the run's folder, and linked into ComfyUI's."""
        path = self.folder / f"{self.name}-{form}-{dtype}.safetensors"
        if not path.exists():
            dmd("export", self.folder, "--as", form, "--dtype", dtype, "--out", path)
            os.link(path, models(self.server, FOLDERS[form], path.name))
        return path

    def make_teacher(self) -> None:
        """A checkpoint with a licence, as Stability's have one; and what is to be known of it."""
        TINY[self.family](self.teacher, clip=True)
        if self.family == "sd15":
            with safe_open(self.teacher, "pt") as file:
                metadata = file.metadata() | {"modelspec.license": LICENSE}
            save_file(load_file(self.teacher), self.teacher, metadata)
        loaded = load(str(self.teacher), CPU)
        network: Any = loaded.network
        assert loaded.text
        condition = loaded.text.encode([PROMPT])
        save_file(condition, self.server.base / f"input/{self.family}-prompt.safetensors")
        start = noise(1, 4, 8, 8, seed=SEED)
        with torch.no_grad():
            latents = {
                str(t): network.predict_x0(start, torch.tensor([t]), condition)
                / LATENT_SCALE[self.family]
                for t in (399, 999)
            }
        save_file(latents, self.teacher.with_suffix(".latents"))

    def train(self) -> None:
        """Training by the command line, once."""
        if self.folder.exists():
            return
        if not self.teacher.exists():
            self.make_teacher()
        prompts, run_yaml = self.server.base / "prompts.txt", self.server.base / f"{self.name}.yaml"
        prompts.write_text(f"{PROMPT}\nan old café at night\n")
        files = {"teacher": self.teacher, "prompts": prompts, "output": self.folder}
        settings = SHORT | SETTINGS[self.name] | {key: str(path) for key, path in files.items()}
        run_yaml.write_text(yaml.safe_dump(settings))
        with pytest.MonkeyPatch.context() as patch:  # two pictures, where ten would take longest
            patch.setattr(SampleSheet.__init__, "__defaults__", (2,))
            dmd("train", run_yaml)


Trained = Callable[[str], Run]
"""The fixture `trained`: a run of SETTINGS, trained when it is first asked for."""


def dmd(*arguments: object) -> None:
    """`python -m dmd_train` with these arguments, in this process, which must end well."""
    assert run_command(*arguments) == 0


def by_sample(file: Path, *more: object, count: int = 1) -> Tensor:
    """The .latent that `python -m dmd_train sample` writes for PROMPT and SEED."""
    out = file.with_name(f"{file.stem}-{count}.latent")
    dmd("sample", file, "--prompt", PROMPT, "--count", count, "--seed", SEED, "--out", out, *more)
    return load_file(out)["latent_tensor"]


class Ways:
    """The ways of one graph to sample a student of `run`: name -> LATENT."""

    def __init__(self, run: Run) -> None:
        self.graph, self.run = Graph(), run
        self.text = self.graph.add("Probe_LoadConditioning", name=f"{run.family}-prompt")
        self.ways: dict[str, Node] = {}

    def teacher(self) -> Node:
        return self.graph.add("CheckpointLoaderSimple", ckpt_name=self.run.teacher.name)

    def stock_lora(self, model: Node, file: Path) -> Node:
        return self.graph.add(
            "LoraLoaderModelOnly", model=model, lora_name=file.name, strength_model=1.0
        )

    def our_lora(self, model: Node, file: Path) -> Node:
        return self.graph.add("DMD_LoadLoRA", model=model, file=file.name, strength=1.0)

    def ours(self, form: str, file: Path) -> Node:
        return self.graph.add("DMD_LoadCheckpoint", file=f"{FOLDERS[form]}/{file.name}")

    def ksampler(
        self,
        name: str,
        model: Node,
        sampler: str = "euler",
        scheduler: str = "simple",
        count: int = 1,
    ) -> None:
        """One step of the stock KSampler at cfg 1."""
        self.ways[name] = self.graph.ksampler(
            model,
            self.text,
            self.graph.empty(batch=count),
            sampler=sampler,
            scheduler=scheduler,
            seed=SEED,
        )

    def errors(self, expected: Tensor) -> dict[str, float]:
        """Each way's error against what `sample` gave, which is far from what the teacher gives."""
        learned = error(self.run.teachers_latent.expand_as(expected), expected)
        sampled = sample(self.run.server, self.graph, *self.ways.values())
        found = {
            name: error(latent, expected) for name, latent in zip(self.ways, sampled, strict=True)
        }
        shown = {name: f"{value:.1e}" for name, value in found.items()}
        print(self.run.name, f"teacher {learned:.1e}", shown)
        assert learned > OFF
        return found
