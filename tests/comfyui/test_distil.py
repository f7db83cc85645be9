"""DMD Distill on the real server: the headless run's weights, stops, other doors, bad wiring."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kit import clip_layout
from kit.checkpoints import UNET, as_diffusers_unet, tiny_sd15, tiny_sdxl
from kit.comfy_host import PromptFailed, Server
from kit.flow_model import text_condition, tiny_sd3
from kit.graphs import Graph, Node, error, models, put, sample, unet_of
from kit.published import kohya, lora_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmd_train.families import UNET_LAYERS
from dmd_train.method.lora import kohya_name
from dmd_train.networks.ldm_names import unet_names
from dmd_train.networks.load import load
from dmd_train.terminal import commands as cli

DIGITS = "dmd_students/digits-teacher.safetensors"
AUTO = "right for the model"
SHORT = {
    "pairs": 512,
    "pair_batch_size": 64,
    "checkpoint_every": 50,
    "sample_every": 100,
}
"""Of a digits run."""
SD = {
    "batch_size": 2,
    "micro_batch_size": 0,
    "critic_updates": 1,
    "pair_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "gradient_checkpointing": False,
    "cpu_threads": 1,
}
PROMPTS = ["a red fox in the snow", "an old café at night", "a lighthouse"]
EXACT = 1e-4
SD3_LAYERS = (
    *("0_x_block_attn_qkv", "0_x_block_attn_proj", "0_x_block_mlp_fc1", "0_x_block_mlp_fc2"),
    *("0_context_block_attn_qkv", "0_context_block_attn_proj", "0_context_block_mlp_fc1"),
    *("0_context_block_mlp_fc2", "1_x_block_attn_qkv", "1_x_block_attn_proj"),
    *("1_x_block_mlp_fc1", "1_x_block_mlp_fc2", "1_context_block_attn_qkv"),
)


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
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS)
    labels = graph.add("DMD_ClassLabel", labels="0-9")
    return distil(graph, model, labels, **({"advanced": SHORT} | settings))


def run_of(server: Server, name: str) -> Path:
    return server.base / "output/dmd_runs" / name


def headless(run_yaml: Path, output: Path) -> None:
    """`python -m dmd_train train` by this very run.yaml, into another folder."""
    cli.app(["train", str(run_yaml), "--set", f"output={output}"], standalone_mode=False)


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def last_state(run: Path) -> Path:
    return max(run.glob("checkpoints/step-*.safetensors"))


def failure(server: Server, graph: Graph) -> str:
    """The one line that a node ended with; the queue must live on."""
    with pytest.raises(PromptFailed) as failed:
        server.run(graph)
    message = failed.value.message
    assert "\n" not in message
    after = Graph()
    after.add("Probe_Memory", nonce=next(_nonce))
    server.run(after)
    return message


_nonce = iter(range(100, 10**6))


@pytest.fixture(scope="module")
def warm(server: Server) -> Server:
    """A server that has trained: what training imports is in memory for good."""
    graph = Graph()
    digits(graph, steps=2, run="warm")
    server.run(graph)
    return server


def test_a_run_in_the_graph_is_the_headless_run_bit_for_bit(server: Server, tmp_path: Path) -> None:
    graph = Graph()
    digits(graph, steps=120, seed=5, run="both doors")
    server.run(graph)
    run = run_of(server, "both doors")
    headless(run / "run.yaml", tmp_path / "headless")
    assert same(run / "student.safetensors", tmp_path / "headless/student.safetensors")
    assert same(last_state(run), last_state(tmp_path / "headless"))


def interrupted(server: Server, graph: Graph, run: Path, at: int) -> None:
    """Run it, and press stop once so many steps are logged."""
    id = server.submit(graph)
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < at:
        time.sleep(0.005)
    server.interrupt()
    with pytest.raises(PromptFailed, match="execution_interrupted"):
        server.wait(id)


def memory(server: Server, nonce: int) -> int:
    graph = Graph()
    probe = graph.add("Probe_Memory", nonce=nonce)
    return int(server.run(graph)["outputs"][probe.id]["text"][0])


def test_a_stopped_run_is_saved_gives_its_memory_back_and_goes_on_to_the_same_weights(
    warm: Server,
) -> None:
    graph = Graph()
    digits(graph, steps=240, seed=8, run="whole")
    warm.run(graph)
    before = memory(warm, 0)

    graph, run = Graph(), run_of(warm, "stopped")
    digits(graph, steps=240, seed=8, run="stopped")
    interrupted(warm, graph, run, at=torch.randint(20, 180, ()).item())
    step = int(last_state(run).stem.removeprefix("step-"))
    assert 20 <= step < 240
    assert (run / "student.safetensors").exists()
    assert abs(memory(warm, 1) / before - 1) <= 0.05

    graph = Graph()
    graph.add("DMD_ContinueRun", run="stopped")
    warm.run(graph)
    assert same(run / "student.safetensors", run_of(warm, "whole") / "student.safetensors")
    assert same(last_state(run), last_state(run_of(warm, "whole")))


def test_pressing_run_again_goes_on_with_a_stopped_run(warm: Server) -> None:
    graph, run = Graph(), run_of(warm, "again")
    digits(graph, steps=200, seed=8, run="again")
    interrupted(warm, graph, run, at=30)
    step = int(last_state(run).stem.removeprefix("step-"))
    warm.run(graph)
    steps = [row["step"] for row in map(yaml.safe_load, (run / "metrics.jsonl").open())]
    assert step < 200 and steps == list(range(1, 201))


def test_a_run_begun_in_a_terminal_goes_on_in_the_graph(server: Server) -> None:
    run, whole = run_of(server, "from a terminal"), run_of(server, "terminal whole")
    settings = SHORT | {"teacher": "digits", "steps": 60, "seed": 2, "checkpoint_every": 20}
    for folder in (run, whole):
        folder.parent.mkdir(exist_ok=True, parents=True)
        run_yaml = server.base / "begun.yaml"
        run_yaml.write_text(yaml.safe_dump(settings | {"output": str(folder)}))
        headless(run_yaml, folder)
    last_state(run).unlink()  # as after a stop between step 40 and 60
    (run / "student.safetensors").unlink()
    assert last_state(run).stem == "step-00000040"

    graph = Graph()
    graph.add("DMD_ContinueRun", run="from a terminal")
    server.run(graph)
    assert same(run / "student.safetensors", whole / "student.safetensors")


def test_the_student_comes_out_as_a_model_that_a_stock_sampler_runs(server: Server) -> None:
    graph = Graph()
    student = digits(graph, steps=60, run="sampled")
    labels = graph.add("DMD_ClassLabel", labels="0-9")
    empty = graph.add("DMD_EmptyLatent", model=student, width=0, height=0, batch_size=10)
    stock = graph.ksampler(student, labels, empty)
    ours = graph.add(
        "DMD_OneStepSampler",
        model=student,
        positive=labels,
        seed=7,
        width=0,
        height=0,
        batch_size=10,
    )
    by_stock, by_ours = sample(server, graph, stock, ours)
    student_file = run_of(server, "sampled") / "student.safetensors"
    shutil.copy(student_file, models(server, "checkpoints", "sampled.safetensors"))
    graph = Graph()
    loaded = graph.add("DMD_LoadCheckpoint", file="checkpoints/sampled.safetensors")
    labels = graph.add("DMD_ClassLabel", labels="0-9")
    empty = graph.add("DMD_EmptyLatent", model=loaded, width=0, height=0, batch_size=10)
    (from_file,) = sample(server, graph, graph.ksampler(loaded, labels, empty))
    assert max(error(by_stock, from_file), error(by_ours, from_file)) <= 1e-6


# --- Stable Diffusion and its like ---


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
    state = load_file(last_state(run))
    return {key: value for key, value in state.items() if "lora" in key and "@" not in key}


def distance(one: Path, other: Path) -> float:
    """Of what two runs learned: relative, in the 2-norm, over the adapters' B, which were zero."""
    a, b = learned(one), learned(other)
    assert a.keys() == b.keys()
    keys = [key for key in a if "lora_B" in key]
    assert all(float(b[key].norm()) > 0 for key in keys if "student" in key)
    gap = math.hypot(*(float((a[key] - b[key]).norm()) for key in keys))
    relative = gap / math.hypot(*(float(b[key].norm()) for key in keys))
    print(f"{one.name} and {other.name}: {relative:.2e} apart")
    return relative


def test_a_checkpoints_run_is_written_down_for_a_terminal_which_learns_the_same(
    server: Server, tmp_path: Path
) -> None:
    graph = Graph()
    sd15_run(server, graph, run="sd15")
    server.run(graph)
    run = run_of(server, "sd15")
    told = yaml.safe_load((run / "run.yaml").read_text())
    assert Path(told["teacher"]).name == "sd15-clip.safetensors"
    assert Path(told["prompts"]).read_text().splitlines() == PROMPTS
    headless(run / "run.yaml", tmp_path / "headless")
    # ComfyUI's modules and diffusers' add in another order
    assert distance(run, tmp_path / "headless") <= 0.01
    one, other = run / "student.safetensors", tmp_path / "headless/student.safetensors"
    assert load_file(one).keys() == load_file(other).keys()
    assert metadata_of(one) == metadata_of(other)


def metadata_of(file: Path) -> dict[str, str]:
    """What a file says, but for the hashes of weights that were added up in another order."""
    with safe_open(file, "pt") as opened:
        said = opened.metadata().items()
    return {k: v for k, v in said if k not in ("dmd.sha256", "dmd.checkpoint")}


def test_gradient_checkpointing_changes_nothing_that_a_lora_learns(server: Server) -> None:
    for name, checkpointing in (("kept", False), ("computed again", True)):
        graph = Graph()
        settings = SD | {"gradient_checkpointing": checkpointing}
        sd15_run(server, graph, run=name, steps=2, advanced=settings)
        server.run(graph)
    assert distance(run_of(server, "kept"), run_of(server, "computed again")) <= 1e-3


def test_a_checkpoints_run_begun_in_a_terminal_goes_on_in_the_graph_by_its_file_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_model = "cond_stage_model.transformer.text_model."
    monkeypatch.setitem(clip_layout.PARTS, 768, [(text_model, 768, 12)])  # as ComfyUI reads it
    checkpoint = models(server, "checkpoints", "sd15-clip-l.safetensors")
    tiny_sd15(checkpoint, clip=True)
    (server.base / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = SD | {"teacher": str(checkpoint), "prompts": str(server.base / "prompts.txt")}
    settings |= {"preset": "sd15-one-step-lora", "steps": 4, "checkpoint_every": 2}
    settings |= {"resolution": 64, "lora_rank": 4}
    run, whole = run_of(server, "sd15 from a terminal"), run_of(server, "sd15 whole")
    run_yaml = server.base / "sd15.yaml"
    for folder in (run, whole):
        run_yaml.write_text(yaml.safe_dump(settings | {"output": str(folder)}))
        headless(run_yaml, folder)
    last_state(run).unlink()  # as after a stop between step 2 and 4
    (run / "student.safetensors").unlink()
    graph = Graph()
    student = graph.add("DMD_ContinueRun", run="sd15 from a terminal")
    text = graph.condition("sd15")
    sample(server, graph, graph.ksampler(student, text, graph.empty()))
    checkpoint.unlink()
    assert distance(run, whole) <= 0.01
    assert (
        load_file(run / "student.safetensors").keys()
        == load_file(whole / "student.safetensors").keys()
    )


def test_a_student_learns_from_its_teacher_with_the_loras_that_are_wired_before_it(
    server: Server, tmp_path: Path
) -> None:
    name = sd15(server)
    checkpoint = server.base / "models/checkpoints" / name
    unet = as_diffusers_unet(checkpoint)
    lora = lora_of(unet, rank=2, seed=3)
    save_file(kohya(lora, alpha=1.0), models(server, "loras", "look.safetensors"))

    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=name)
    patched = graph.add(
        "LoraLoaderModelOnly", model=loaded, lora_name="look.safetensors", strength_model=1.0
    )
    sd15_run(server, graph, patched, run="with a look")
    sd15_run(server, graph, loaded, run="plain")
    server.run(graph)
    with_look, plain = run_of(server, "with a look"), run_of(server, "plain")

    # the same LoRA, put into the file by hand; trained headless
    tensors = load_file(checkpoint)
    names = unet_names(unet.state_dict(), unet.config)
    for layer, (down, up) in lora.items():
        key = UNET + names[f"{layer}.weight"]
        product = up.half().float().flatten(1) @ down.half().float().flatten(1)
        tensors[key] = tensors[key].float() + product.view(tensors[key].shape) / 2
    with safe_open(checkpoint, "pt") as file:
        save_file(tensors, tmp_path / "merged.safetensors", file.metadata())
    told = yaml.safe_load((plain / "run.yaml").read_text())
    told |= {"teacher": str(tmp_path / "merged.safetensors")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(told))
    headless(tmp_path / "run.yaml", tmp_path / "merged")

    assert distance(with_look, tmp_path / "merged") <= 0.01
    assert distance(plain, tmp_path / "merged") > 0.1
    assert "ComfyUI MODEL sd1" in (with_look / "run.yaml").read_text()


def test_a_lora_student_is_the_model_that_load_dmd_lora_makes_of_its_file(server: Server) -> None:
    graph = Graph()
    student = sd15_run(server, graph, run="lora out", steps=6, seed=4)
    text = graph.condition("sd15")
    (out,) = sample(server, graph, graph.ksampler(student, text, graph.empty()))
    file = run_of(server, "lora out") / "student.safetensors"
    shutil.copy(file, models(server, "loras", "lora-out.safetensors"))
    graph = Graph()
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=sd15(server))
    again = graph.add("DMD_LoadLoRA", model=loaded, file="lora-out.safetensors", strength=1.0)
    text = graph.condition("sd15")
    (from_file, teacher) = sample(
        server,
        graph,
        graph.ksampler(again, text, graph.empty()),
        graph.ksampler(loaded, text, graph.empty()),
    )
    assert error(out, from_file) <= 1e-6
    assert error(out, teacher) > 1e-3


def test_a_student_of_full_training_is_the_model_of_its_file(server: Server) -> None:
    graph = Graph()
    settings = {"preset": "sd15-one-step-full", "run": "full", "steps": 2, "rank": 0}
    student = sd15_run(server, graph, **settings)
    text = graph.condition("sd15")
    (out,) = sample(server, graph, graph.ksampler(student, text, graph.empty()))
    file = run_of(server, "full") / "student.safetensors"
    shutil.copy(file, models(server, "diffusion_models", "full.safetensors"))
    graph = Graph()
    again = graph.add("DMD_LoadCheckpoint", file="diffusion_models/full.safetensors")
    text = graph.condition("sd15")
    (from_file,) = sample(server, graph, graph.ksampler(again, text, graph.empty()))
    assert error(out, from_file) <= 1e-6


def test_the_wired_model_and_what_else_it_feeds_are_untouched(server: Server) -> None:
    def look(nonce: int, train: bool) -> tuple[torch.Tensor, str]:
        graph = Graph()
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name=sd15(server))
        text = graph.condition("sd15", seed=nonce)
        after = {"after": sd15_run(server, graph, loaded, run="untouched")} if train else {}
        probe = graph.add("Probe_Weights", model=loaded, nonce=nonce, **after)
        same = graph.condition("sd15")
        (latent,) = sample(server, graph, graph.ksampler(loaded, same, graph.empty(), seed=3))
        del text
        return latent, str(graph.shown[probe.id]["text"])

    before, weights = look(0, train=False)
    after, weights_after = look(1, train=True)
    assert torch.equal(before, after)
    assert weights == weights_after


@pytest.mark.parametrize("family", ["sdxl", "SD3"])
def test_other_families_give_one_step_loras_too(server: Server, family: str) -> None:
    graph = Graph()
    if family == "sdxl":
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sdxl))
        text, away = graph.condition("sdxl"), graph.condition("sdxl", seed=1)
        empty = graph.empty()
    else:
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd3))
        text, away = text_condition(graph, "SD3"), text_condition(graph, "SD3", seed=1)
        empty = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    short = SD | {"pairs": 2, "pair_batch_size": 2, "regression_warmup_steps": 0}
    short |= {"batch_size": 1, "conditioning_timestep": 999}
    student = distil(
        graph,
        loaded,
        text,
        steps=2,
        resolution=64,
        rank=4,
        run=f"a student of {family}",
        advanced=short,
        negative=away,
        vae=loaded[2],
    )
    file = run_of(server, f"a student of {family}") / "student.safetensors"
    stock = graph.ksampler(student, text, empty, sampler="euler")
    teacher = graph.ksampler(loaded, text, empty, sampler="euler")
    by_stock, by_ours, before = sample(server, graph, stock, graph.one_step(student, text), teacher)
    assert error(by_ours, by_stock) <= EXACT
    assert error(before, by_stock) > 1e-3
    layers = {key.partition(".")[0] for key in load_file(file) if key.endswith("up.weight")}
    if family == "sdxl":
        unet = unet_of(server.base / "models/checkpoints" / put(server, tiny_sdxl))
        names = [name for name, _ in unet.named_modules() if re.fullmatch(UNET_LAYERS, name)]
        assert layers == {kohya_name(name) for name in names}
    else:  # both blocks, but for what tells them the time
        assert layers == {f"lora_unet_joint_blocks_{layer}" for layer in SD3_LAYERS}


def test_cores_own_nodes_take_the_lora_and_the_losses(server: Server) -> None:
    graph = Graph()
    student = sd15_run(server, graph, run="for core", steps=3)
    graph.add("SaveLoRA", lora=student[1], prefix="loras/trained")
    graph.add("LossGraphNode", loss=student[2], filename_prefix="losses")
    graph.add("SaveImage", images=student[3], filename_prefix="sheet")
    again = graph.add("CheckpointLoaderSimple", ckpt_name=sd15(server))
    stock = graph.add(
        "LoraModelLoader", model=again, lora=student[1], strength_model=1.0, bypass=False
    )
    text = graph.condition("sd15")
    by_core, ours = sample(
        server,
        graph,
        graph.ksampler(stock, text, graph.empty()),
        graph.ksampler(student, text, graph.empty()),
    )
    assert error(by_core, ours) <= 1e-6
    (saved,) = (server.base / "output/loras").glob("trained*.safetensors")
    assert same(saved, run_of(server, "for core") / "student.safetensors")


def test_an_eight_bit_base_learns_a_lora_and_says_why_not_more(server: Server) -> None:
    sd15(server)
    source = server.base / "models/checkpoints/sd15-clip.safetensors"
    tensors = {k: v for k, v in load_file(source).items() if k.startswith(UNET)}
    save_file(tensors, models(server, "diffusion_models", "lone.safetensors"))

    def graph_of(**more: Any) -> Graph:
        graph = Graph()
        lone = graph.add("UNETLoader", unet_name="lone.safetensors", weight_dtype="fp8_e4m3fn")
        sd15_run(server, graph, lone, steps=2, **more)
        return graph

    server.run(graph_of(run="eight bits"))
    assert all(float(v.norm()) > 0 for k, v in learned(run_of(server, "eight bits")).items())
    message = failure(server, graph_of(run="eight bits full", preset="sd15-one-step-full"))
    assert "8 bits or fewer, which no optimiser can step. Choose a LoRA preset" in message


def test_a_run_named_after_its_settings_is_another_one_with_other_pairs(server: Server) -> None:
    folders = []
    for count in (4, 8, 4):
        graph = Graph()
        model = graph.add("DMD_LoadCheckpoint", file=DIGITS)
        labels = graph.add("DMD_ClassLabel", labels="0-9")
        pairs = graph.add(
            "DMD_TeacherPairs",
            model=model,
            conditions=labels,
            name="few",
            count=count,
            seed=0,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            width=0,
            height=0,
            batch_size=4,
        )
        short = SHORT | {"pair_batch_size": 2}
        student = distil(graph, model, labels, steps=2, pairs=pairs, advanced=short)
        shown = graph.add("Probe_ShowText", text=student[4])
        folders.append(server.run(graph)["outputs"][shown.id]["text"][0])
    assert folders[0] == folders[2] != folders[1]


# --- bad wiring ---

Wiring = Callable[[Server, Graph], object]


def another_familys_conditions(server: Server, graph: Graph) -> None:
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=sd15(server))
    distil(graph, loaded, graph.condition("sdxl"), resolution=64, guidance=1.0, advanced=SD)


def conditions_without_the_pooled_text(server: Server, graph: Graph) -> None:
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sdxl))
    distil(graph, loaded, graph.condition("sd15"), resolution=64, guidance=1.0, advanced=SD)


def no_negative(server: Server, graph: Graph) -> None:
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=sd15(server))
    distil(graph, loaded, graph.condition("sd15"), resolution=64, advanced=SD)


def conditions_that_are_no_numbers(server: Server, graph: Graph) -> None:
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=sd15(server))
    nan = torch.full((1, 77, 768), float("nan"))
    save_file({"text": nan}, server.base / "input/nan.safetensors")
    broken = graph.add("Probe_LoadConditioning", name="nan")
    distil(graph, loaded, broken, resolution=64, guidance=1.0, advanced=SD)


def no_labels(server: Server, graph: Graph) -> None:
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS)
    distil(graph, model, graph.condition("sd15"), advanced=SHORT)


def no_class_at_all(server: Server, graph: Graph) -> None:
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS)
    distil(graph, model, graph.add("DMD_ClassLabel", labels=""), advanced=SHORT)


def another_latent_format(server: Server, graph: Graph) -> None:
    flow = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd3))
    sd15_run(server, graph, vae=flow[2])


def out_of_the_folder(server: Server, graph: Graph) -> None:
    digits(graph, run="../elsewhere")


def hidden(server: Server, graph: Graph) -> None:
    digits(graph, run=".hidden")


def one_name_for_two(server: Server, graph: Graph) -> None:
    digits(graph, run="twice", steps=2, seed=0)
    digits(graph, run="twice", steps=2, seed=1)


def not_for_this_model(server: Server, graph: Graph) -> None:
    sd15_run(server, graph, preset="sdxl-one-step-lora")


def misspelt(server: Server, graph: Graph) -> None:
    digits(graph, advanced="batchsize: 3")


def no_yaml(server: Server, graph: Graph) -> None:
    digits(graph, advanced="faster please")


def set_by_the_graph(server: Server, graph: Graph) -> None:
    digits(graph, advanced="output: /tmp/x")


def a_student_already(server: Server, graph: Graph) -> None:
    model = graph.add("DMD_LoadCheckpoint", file="dmd_students/digits-one-step.safetensors")
    distil(graph, model, graph.add("DMD_ClassLabel", labels="0-9"), advanced=SHORT)


def no_layer_for_an_adapter(server: Server, graph: Graph) -> None:
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS)
    bare = graph.add("Probe_NoLayers", model=model)
    distil(
        graph,
        bare,
        graph.add("DMD_ClassLabel", labels="0-9"),
        advanced=SHORT | {"training": "lora"},
    )


def more_than_the_device_has(server: Server, graph: Graph) -> None:
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=sd15(server))
    small = graph.add("Probe_SmallDevice", model=loaded)
    sd15_run(server, graph, small, preset="sd15-one-step-full")


REFUSED: dict[Wiring, str] = {
    another_familys_conditions: "conditions: sd1 cannot read this CONDITIONING",
    conditions_without_the_pooled_text: "conditions: sdxl cannot read this CONDITIONING",
    conditions_that_are_no_numbers: "conditions: with it sd1 predicts values that are not finite",
    no_negative: "negative: guidance needs one. Wire DMD Prompts' negative, or set guidance: 1.",
    no_labels: "conditions: this model draws the classes 0 to 9. Wire DMD Class Label",
    no_class_at_all: "conditions: this model draws the classes 0 to 9. Wire DMD Class Label",
    another_latent_format: "vae: its latents have 16 channels, sd1's have 4. Wire the VAE of",
    out_of_the_folder: "run: '../elsewhere' is no name of a folder. Use letters",
    hidden: "run: '.hidden' is no name of a folder. Use letters",
    one_name_for_two: "Set it back, or choose another folder for the run.",
    not_for_this_model: "sdxl-one-step-lora is for sdxl, but",
    misspelt: "unknown key 'batchsize'. Did you mean 'batch_size'?",
    no_yaml: "advanced: write one 'key: value' a line",
    set_by_the_graph: "advanced: output is set by the graph. Take this line out.",
    a_student_already: "is a 1-step student already",
    no_layer_for_an_adapter: "no layer takes an adapter, so critic and student have no room.",
    more_than_the_device_has: "needs 0.3 GiB or more for teacher, critic and student",
}


@pytest.mark.parametrize("wiring", REFUSED, ids=lambda wiring: wiring.__name__)
def test_what_cannot_be_is_one_line_on_the_node_and_the_queue_goes_on(
    server: Server, wiring: Wiring
) -> None:
    graph = Graph()
    wiring(server, graph)
    assert REFUSED[wiring] in failure(server, graph)
    assert not (server.base / "output/elsewhere").exists()


def test_after_running_out_of_memory_the_run_goes_on_from_its_checkpoint(server: Server) -> None:
    graph, run = Graph(), run_of(server, "tight again")
    loaded = graph.add("CheckpointLoaderSimple", ckpt_name=sd15(server))
    tight = graph.add("Probe_OutOfMemory", model=loaded, call=100)
    settings = {"run": "tight again", "steps": 40, "advanced": SD | {"checkpoint_every": 2}}
    sd15_run(server, graph, tight, **settings)
    message = failure(server, graph)
    assert "out of memory. Its checkpoints are kept. Set micro_batch_size: 1." in message
    kept = int(last_state(run).stem.removeprefix("step-"))
    assert 0 < kept < 40
    server.run(graph)  # the probe fails but once
    steps = [row["step"] for row in map(yaml.safe_load, (run / "metrics.jsonl").open())]
    assert steps == list(range(1, 41))


def test_a_run_of_a_patched_model_is_continued_with_that_model_and_no_other(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = sd15(server)
    unet = as_diffusers_unet(server.base / "models/checkpoints" / name)
    save_file(kohya(lora_of(unet, 2), alpha=1.0), models(server, "loras", "mine.safetensors"))

    def wired(graph: Graph, strength: float) -> tuple[Node, Node]:
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name=name)
        model = graph.add(
            "LoraLoaderModelOnly",
            model=loaded,
            lora_name="mine.safetensors",
            strength_model=strength,
        )
        return model, graph.add("Probe_Prompts", name="sd15-prompts")

    graph = Graph()
    sd15_run(server, graph, wired(graph, 1.0)[0], run="mine", steps=4, advanced=SD)
    server.run(graph)
    run = run_of(server, "mine")
    whole = load_file(run / "student.safetensors")

    last_state(run).unlink()
    assert not list(run.glob("checkpoints/step-*"))
    bare = Graph()
    bare.add("DMD_ContinueRun", run="mine")
    assert "Wire that MODEL and its conditions into this node" in failure(server, bare)
    other = Graph()
    model, told = wired(other, 0.5)
    other.add("DMD_ContinueRun", run="mine", model=model, conditions=told, negative=told[1])
    assert "was begun with teacher: ComfyUI MODEL sd1" in failure(server, other)
    right = Graph()
    model, told = wired(right, 1.0)
    right.add("DMD_ContinueRun", run="mine", model=model, conditions=told, negative=told[1])
    server.run(right)
    again = load_file(run / "student.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)

    last_state(run).unlink()
    with pytest.raises(SystemExit):
        cli.main(["train", str(run / "run.yaml")])
    assert "Go on with the run there." in capfd.readouterr().err
