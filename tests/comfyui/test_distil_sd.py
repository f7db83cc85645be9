"""DMD Distill on Stable Diffusion and its like: what is learned, written down, and let alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kit import clip_layout
from kit.checkpoints import UNET, as_diffusers_unet, tiny_sd15, tiny_sdxl
from kit.comfy_host import Server
from kit.distil_graphs import (
    PROMPTS,
    SD,
    distance,
    distil,
    failure,
    headless,
    learned,
    run_of,
    sd15,
    sd15_run,
)
from kit.flow_model import text_condition, tiny_sd3
from kit.graphs import (
    Graph,
    error,
    models,
    put,
    sample,
    unet_of,
)
from kit.published import kohya, lora_of
from kit.runs import newest, same_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmd_train.families import UNET_LAYERS
from dmd_train.files.mark import MARK_KEY
from dmd_train.method.lora import kohya_name
from dmd_train.networks.ldm_names import unet_names
from dmd_train.run.folder import CHECKPOINT_KEY

EXACT = 1e-4
SD3_LAYERS = (
    *("0_x_block_attn_qkv", "0_x_block_attn_proj", "0_x_block_mlp_fc1", "0_x_block_mlp_fc2"),
    *("0_context_block_attn_qkv", "0_context_block_attn_proj", "0_context_block_mlp_fc1"),
    *("0_context_block_mlp_fc2", "1_x_block_attn_qkv", "1_x_block_attn_proj"),
    *("1_x_block_mlp_fc1", "1_x_block_mlp_fc2", "1_context_block_attn_qkv"),
)


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
    of_weights = {MARK_KEY, CHECKPOINT_KEY}
    said, too = metadata_of(one), metadata_of(other)
    assert {k: v for k, v in said.items() if k not in of_weights} == {
        k: v for k, v in too.items() if k not in of_weights
    }
    assert said.keys() == too.keys()


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
    run_yaml.write_text(yaml.safe_dump(settings | {"output": str(run)}))
    headless(run_yaml, run)
    shutil.copytree(run, whole)
    newest(run).unlink()  # as after a stop between step 2 and 4
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
def test_other_families_give_loras_too_and_several_steps_are_stock_eulers(
    server: Server, family: str
) -> None:
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
    timesteps = [699, 524, 349, 174] if family == "sdxl" else [999, 749, 499, 249]
    short |= {"batch_size": 1, "timesteps": timesteps, "sampler": "deterministic"}
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
    stock = graph.ksampler(student, text, empty, steps=4, sampler="euler")
    ours, other = graph.one_step(student, text), graph.ksampler(student, text, empty, steps=4)
    by_stock, by_ours, by_lcm = sample(server, graph, stock, ours, other)
    assert error(by_ours, by_stock) <= EXACT
    assert error(by_lcm, by_stock) > 1e-3
    assert all(float(v.norm()) > 0 for v in learned(file.parent).values())
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
    assert same_files(saved, run_of(server, "for core") / "student.safetensors")


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
