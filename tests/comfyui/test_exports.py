"""Every export loads in ComfyUI, and one step of its stock KSampler gives what `sample` gives.

Tiny files of the true layouts, trained for two steps by the command line. Their text encoders are
too shallow for ComfyUI's, so ComfyUI is told the condition that this package's encoder computes;
one file with a full CLIP-L shows that both encoders say the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from kit import clip_layout
from kit.checkpoints import UNET, as_diffusers_unet, tiny_sd2_v, tiny_sd15, tiny_sdxl
from kit.comfy_host import PromptFailed, Server
from kit.graphs import LATENT_SCALE, Graph, Node, error, models, noise, put, sample, told
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_train.families import UNET_LAYERS
from dmd_train.method.lora import kohya_name
from dmd_train.method.recipe import Recipe
from dmd_train.networks.ldm_names import unet_names
from dmd_train.networks.load import load
from dmd_train.terminal.commands import main

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
SETTINGS: dict[str, dict[str, Any]] = {
    "sd15": {"preset": "sd15-one-step-lora"},
    "sd15-full": {"preset": "sd15-one-step-full", "ema_decay": 0.9},
    "sd2v": {"preset": "sd2-one-step-lora", "guidance": 1.0},
    "sdxl": {"preset": "sdxl-one-step-lora", "guidance": 1.0, "regression_warmup_steps": 1},
    "sdxl-999": {
        "preset": "sdxl-one-step-lora",
        "guidance": 1.0,
        "regression_warmup_steps": 1,
        "conditioning_timestep": 999,
        "steps": 1,
    },
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
        """Of PROMPT, by this package's text encoder."""
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
        """With a licence, as Stability's have one; and what is to be known of it."""
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


Trained = Callable[[str], Run]


@pytest.fixture(scope="module")
def trained(server: Server) -> Trained:
    """A run of SETTINGS, trained when it is first asked for."""

    @cache
    def train(name: str) -> Run:
        run = Run(name, server)
        if not run.teacher.exists():
            run.make_teacher()
        prompts, run_yaml = server.base / "prompts.txt", server.base / f"{name}.yaml"
        prompts.write_text(f"{PROMPT}\nan old café at night\n")
        files = {"teacher": run.teacher, "prompts": prompts, "output": run.folder}
        settings = SHORT | SETTINGS[name] | {key: str(path) for key, path in files.items()}
        run_yaml.write_text(yaml.safe_dump(settings))
        dmd("train", run_yaml)
        return run

    return train


def dmd(*arguments: object) -> None:
    """`python -m dmd_train` with these arguments, in this process. Raises SystemExit if refused."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        if ended.code:
            raise


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command ended with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


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
        """Of each way, against what `sample` gave, which is far from what the teacher gives."""
        learned = error(self.run.teachers_latent.expand_as(expected), expected)
        sampled = sample(self.run.server, self.graph, *self.ways.values())
        found = {
            name: error(latent, expected) for name, latent in zip(self.ways, sampled, strict=True)
        }
        shown = {name: f"{value:.1e}" for name, value in found.items()}
        print(self.run.name, f"teacher {learned:.1e}", shown)
        assert learned > OFF
        return found


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd2v", "sdxl-999"])
def test_a_lora_over_its_teacher_draws_by_stock_nodes_and_ours_what_sample_draws(
    trained: Trained, name: str
) -> None:
    run = trained(name)
    lora = run.export("lora")
    ways = Ways(run)
    teacher = ways.teacher()
    ours, stock = ways.our_lora(teacher, lora), ways.stock_lora(teacher, lora)
    ways.ksampler("stock euler, simple", stock)
    ways.ksampler("Load DMD LoRA", ours, "lcm", "normal")
    expected = by_sample(lora)
    logged = len(run.server.log())
    assert max(ways.errors(expected).values()) <= EXACT
    assert "not loaded" not in run.server.log()[logged:]  # what ComfyUI says of a key unknown to it
    assert told(ways.graph, ours) == run.says.format("kohya LoRA")


def test_an_sdxl_lora_of_timestep_399_is_right_by_its_recipe_and_wrong_without(
    trained: Trained,
) -> None:
    run = trained("sdxl")
    lora = run.export("lora")
    ways = Ways(run)
    teacher = ways.teacher()
    ours, stock = ways.our_lora(teacher, lora), ways.stock_lora(teacher, lora)
    ways.ksampler("without the recipe", stock)
    ways.ksampler("Load DMD LoRA", ours, "lcm", "normal")
    ways.ksampler("DMD Model Sampling", ways.graph.model_sampling(stock, RECIPE_399))
    expected = by_sample(lora)
    errors = ways.errors(expected)
    assert errors.pop("without the recipe") > OFF
    assert max(errors.values()) <= EXACT
    assert told(ways.graph, ours) == run.says.format("kohya LoRA")


def test_a_batch_of_two_is_what_sample_draws_for_a_count_of_two(trained: Trained) -> None:
    run = trained("sd15")
    lora = run.export("lora")
    ways = Ways(run)
    ways.ksampler("stock", ways.stock_lora(ways.teacher(), lora), count=2)
    expected = by_sample(lora, count=2)
    assert error(expected[1:], expected[:1]) > OFF
    assert max(ways.errors(expected).values()) <= EXACT


HEADS: dict[str, Any] = {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
FULL_SIZE: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768},
    "SD 2": HEADS | {"cross_attention_dim": 1024},
    "SDXL": HEADS
    | {
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""UNet2DConditionModel's arguments beside its defaults, which are SD 1's."""


def full_size(name: str) -> UNet2DConditionModel:
    """The tiny ones have no middle block, and little attention on the way up."""
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel(**FULL_SIZE[name])
    return unet


@pytest.mark.parametrize("name", FULL_SIZE)
def test_comfyui_has_both_our_names_of_every_weight_of_a_full_size_unet_in_its_table(
    server: Server, name: str
) -> None:
    unet = full_size(name)
    weights = unet.state_dict()
    names = unet_names(weights, unet.config)
    graph = Graph()
    shapes = {UNET + names[key]: list(value.shape) for key, value in weights.items()}
    probe = graph.add("Probe_UnetNames", shapes=json.dumps(shapes))
    (table,) = server.run(graph)["outputs"][probe.id]["names"]
    assert {key: table.get(key) for key in names} == names


@pytest.mark.parametrize("name", FULL_SIZE)
def test_diffusers_finds_every_layer_of_a_full_size_lora(name: str) -> None:
    unet = full_size(name)
    layers = [layer for layer, _ in unet.named_modules() if re.fullmatch(UNET_LAYERS, layer)]
    assert len(layers) > 200
    file = {
        f"{kohya_name(layer)}.{part}": torch.ones(())
        for layer in layers
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    pipeline: Any = StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(file, unet_config=unet.config)
    found = convert_unet_state_dict_to_peft(state)
    assert set(found) == {f"unet.{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    assert len(alphas) == len(layers)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_diffusers_own_loader_puts_a_lora_into_the_teachers_unet_and_draws_the_same(
    trained: Trained, name: str
) -> None:
    run = trained(name)
    lora = run.export("lora")
    unet: Any = as_diffusers_unet(run.teacher)
    pipeline: Any = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(str(lora), unet_config=unet.config)
    pipeline.load_lora_into_unet(state, alphas, unet)
    layers = sum(key.endswith(".alpha") for key in load_file(lora))
    assert sum(".lora_A." in key for key in unet.state_dict()) == layers

    condition, added = run.condition, None
    if "pooled" in condition:
        sizes = torch.tensor([[64.0, 64.0, 0, 0, 64.0, 64.0]])
        added = {"text_embeds": condition["pooled"], "time_ids": sizes}
    start, t = noise(1, 4, 8, 8, seed=SEED), torch.tensor(run.timestep)
    scheduler = LCMScheduler()
    scheduler.set_timesteps(timesteps=[run.timestep])
    with torch.no_grad():
        output = unet(start, t, condition["text"], added_cond_kwargs=added).sample
    sampled = scheduler.step(output, t, start).denoised / LATENT_SCALE[run.family]
    found = error(sampled, by_sample(lora))
    print(name, f"diffusers {found:.1e}")
    assert found <= EXACT


@pytest.mark.parametrize(("name", "over"), [("sd15", "sd2v"), ("sdxl", "sd15"), ("sd2v", "sd15")])
def test_a_lora_over_another_familys_model_is_refused_in_one_line(
    trained: Trained, capfd: pytest.CaptureFixture[str], name: str, over: str
) -> None:
    run, other = trained(name), trained(over)
    lora = run.export("lora")
    ways = Ways(other)
    ways.ksampler("refused", ways.our_lora(ways.teacher(), lora))
    with pytest.raises(PromptFailed) as failure:
        sample(run.server, ways.graph, *ways.ways.values())
    assert failure.value.node_type == "DMD_LoadLoRA"
    assert failure.value.message == (
        f"{models(run.server, 'loras', lora.name)}: this LoRA is for {FAMILY[name]}, "
        f"the model is {FAMILY[over]}"
    )
    line = refused(
        capfd,
        *("sample", lora, "--prompt", PROMPT, "--out", run.folder / "x.latent"),
        *("--base", other.teacher),
    )
    assert f"{FAMILY[name]}, but {other.teacher} is {FAMILY[over]}" in line


# --- UNet and checkpoint --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd15-full", "sd2v", "sdxl"])
def test_a_unet_draws_by_stock_nodes_and_ours_what_sample_draws(
    trained: Trained, name: str
) -> None:
    run = trained(name)
    file = run.export("unet")
    ways = Ways(run)
    stock = ways.graph.add("UNETLoader", unet_name=file.name, weight_dtype="default")
    check(ways, stock, "unet", file)


@pytest.mark.parametrize("name", ["sd15", "sd15-full", "sd2v", "sdxl"])
def test_a_checkpoint_draws_by_stock_nodes_and_ours_what_sample_draws_without_a_base(
    trained: Trained, name: str, tmp_path: Path
) -> None:
    run = trained(name)
    file = run.export("checkpoint")
    ways = Ways(run)
    stock = ways.graph.add("CheckpointLoaderSimple", ckpt_name=file.name)
    alone = tmp_path / "alone" / file.name
    alone.parent.mkdir()
    os.link(file, alone)
    check(ways, stock, "checkpoint", alone)


def check(ways: Ways, stock: Node, form: str, file: Path) -> None:
    """A loaded student, and the same by Load DMD Checkpoint, against `sample` on `file`."""
    run, ours = ways.run, ways.ours(form, file)
    if run.timestep == 399:
        ways.ksampler("without the recipe", stock)
        stock = ways.graph.model_sampling(stock, RECIPE_399)
    ways.ksampler("stock", stock)
    ways.ksampler("Load DMD Checkpoint", ours, "lcm", "normal")
    expected = by_sample(file)
    errors = ways.errors(expected)
    assert errors.pop("without the recipe", 1.0) > OFF
    assert max(errors.values()) <= EXACT
    layout = "LDM UNet" if form == "unet" else "LDM single file with CLIP and VAE"
    assert told(ways.graph, ours) == run.says.format(layout)


def test_the_vae_of_a_checkpoint_decodes_as_its_teachers(trained: Trained) -> None:
    run = trained("sd15")
    file = run.export("checkpoint")
    ways = Ways(run)
    loaders = [
        ways.teacher(),
        ways.graph.add("CheckpointLoaderSimple", ckpt_name=file.name),
        ways.ours("checkpoint", file),
    ]
    latent = ways.graph.ksampler(loaders[1], ways.text, ways.graph.empty(), seed=SEED)
    for loader in loaders:
        image = ways.graph.add("VAEDecode", samples=latent, vae=loader[2])
        ways.graph.add("SaveImage", images=image, filename_prefix="vae")
    pictures = run.server.output_files(run.server.run(ways.graph))
    assert len(pictures) == 3
    assert len({picture.read_bytes() for picture in pictures}) == 1


@pytest.mark.parametrize("dtype", TYPES)
def test_text_encoder_and_vae_in_a_checkpoint_of_any_dtype_are_the_teachers_bit_for_bit(
    trained: Trained, dtype: str
) -> None:
    run = trained("sd15")
    teacher, student = load_file(run.teacher), load_file(run.export("checkpoint", dtype))
    assert student.keys() == teacher.keys()
    beside = {key for key in teacher if not key.startswith(UNET)}
    assert beside
    for key in beside:
        assert student[key].dtype == teacher[key].dtype
        assert torch.equal(student[key], teacher[key])


def test_a_lora_or_a_unet_alone_needs_its_base_named_and_a_checkpoint_needs_none(
    trained: Trained, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = trained("sd15")
    drawn = {}
    for form in ("lora", "unet", "checkpoint"):
        file = tmp_path / form / f"{form}.safetensors"
        file.parent.mkdir()
        shutil.copy(run.export(form), file)
        if form == "checkpoint":
            drawn[form] = by_sample(file)
            continue
        line = refused(capfd, "sample", file, "--prompt", PROMPT, "--out", tmp_path / "x.latent")
        assert f"{file}: a " in line
        assert "--base FILE" in line
        drawn[form] = by_sample(file, "--base", run.teacher)
    for form, latent in drawn.items():
        assert torch.equal(latent, by_sample(run.export(form)))


def test_a_full_run_has_no_lora_to_export_and_says_so_in_one_line(
    trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trained("sd15-full")
    out = run.folder / "refused.safetensors"
    line = refused(capfd, "export", run.folder, "--as", "lora", "--out", out)
    assert line == (
        f"error: {run.folder}: was trained with training: full, so there is no LoRA. "
        "Use --as unet or --as checkpoint."
    )
    assert not out.exists()


@pytest.mark.parametrize(("name", "form"), [("sd15", "lora"), ("sd15-full", "unet")])
def test_an_export_in_fp16_is_the_student_that_training_left_bit_for_bit(
    trained: Trained, name: str, form: str
) -> None:
    """Of a run with an average, that average."""
    run = trained(name)
    left, exported = run.folder / "student.safetensors", run.export(form)
    expected, found = load_file(left), load_file(exported)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value)
    with safe_open(left, "pt") as one, safe_open(exported, "pt") as other:
        assert one.metadata() == other.metadata()


# --- dtypes and metadata --------------------------------------------------------------------------


def test_lora_unet_and_checkpoint_in_fp32_are_one_student_and_bf16_is_near_it(
    trained: Trained,
) -> None:
    run = trained("sd15")
    lora, *others = (by_sample(run.export(form, "fp32")) for form in FOLDERS)
    errors = [error(other, lora) for other in others]
    rounding = error(by_sample(run.export("lora", "bf16")), lora)
    print("fp32", errors, "bf16", rounding)
    assert max(errors) <= 1e-5
    assert 0 < rounding <= OFF


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("lora", "fp32"), ("lora", "bf16"), ("unet", "bf16"), ("checkpoint", "bf16")],
)
def test_exports_of_other_dtypes_draw_in_stock_nodes_what_sample_draws(
    trained: Trained, form: str, dtype: str
) -> None:
    run = trained("sd15")
    file = run.export(form, dtype)
    ways = Ways(run)
    match form:
        case "lora":
            model = ways.stock_lora(ways.teacher(), file)
        case "unet":
            model = ways.graph.add("UNETLoader", unet_name=file.name, weight_dtype="default")
        case _:
            model = ways.graph.add("CheckpointLoaderSimple", ckpt_name=file.name)
    ways.ksampler(f"{form} {dtype}", model)
    assert max(ways.errors(by_sample(file)).values()) <= EXACT


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", FOLDERS)
def test_every_export_is_of_its_dtype_and_names_recipe_teacher_and_licence(
    trained: Trained, form: str, dtype: str
) -> None:
    run = trained("sd15")
    with safe_open(run.export(form, dtype), "pt") as file:
        metadata = file.metadata()
        own = [key for key in list(file.keys()) if form == "lora" or key.startswith(UNET)]
        assert {file.get_tensor(key).dtype for key in own} == {TYPES[dtype]}
    assert Recipe.model_validate_json(metadata["dmd.recipe"]) == Recipe(
        family="sd1",
        prediction="eps",
        timesteps=(999,),
        noise_scale=1.0,
        baked_guidance=3.0,
        teacher=run.teacher.stem,
        teacher_sha256=hashlib.sha256(run.teacher.read_bytes()).hexdigest(),
        license=LICENSE,
    )
    assert metadata["modelspec.license"] == LICENSE
    assert metadata["modelspec.resolution"] == "64x64"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd15", {"ss_base_model_version": "sd_v1"}),
        ("sd2v", {"ss_base_model_version": "sd_v2", "ss_v2": "True"}),
        ("sdxl", {"ss_base_model_version": "sdxl_base_v1-0"}),
    ],
)
def test_a_lora_says_its_family_as_a1111_and_forge_read_it(
    trained: Trained, name: str, expected: dict[str, str]
) -> None:
    """They list any other file with metadata as one for SD 1, and hide it beside SDXL."""
    with safe_open(trained(name).export("lora"), "pt") as file:
        metadata = file.metadata()
    assert {key: value for key, value in metadata.items() if key.startswith("ss_")} == expected


# --- text -----------------------------------------------------------------------------------------

PROMPTS = (
    "a red fox in the snow",
    "Ein Käse-Soufflé, naïve crème brûlée — São Paulo, 1987!",
    "it's the artist's 3rd self-portrait: oil/canvas, 50% grey; \"no title\" #7? 日本 🦊",
)


def test_a_full_clip_says_of_three_prompts_what_our_text_encoder_says(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        clip_layout.PARTS, 768, [("cond_stage_model.transformer.text_model.", 768, 12)]
    )

    def clip_l(path: Path) -> None:
        tiny_sd15(path, clip=True)

    path = models(server, "checkpoints", put(server, clip_l))
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=path.name)
    for i, prompt in enumerate(PROMPTS):
        text = graph.add("CLIPTextEncode", clip=loaded[1], text=prompt)
        graph.add("Probe_SaveConditioning", conditioning=text, name=f"clip-{i}")
    server.run(graph)
    theirs = torch.cat(
        [load_file(server.base / f"output/clip-{i}.safetensors")["text"] for i in range(3)]
    )
    encoder = load(str(path), CPU).text
    path.unlink()
    assert encoder
    ours = encoder.encode(list(PROMPTS))["text"]
    errors = [error(a, b) for a, b in zip(theirs, ours, strict=True)]
    print("clip", errors)
    assert max(errors) <= EXACT
    assert error(ours[1:2], ours[:1]) > OFF
