"""Models of single pictures whose latents have a time axis of one: as any other, from end to end.

Qwen-Image, Krea 2 and Cosmos Predict2, and Wan 2.1 at one frame.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from kit.comfy_host import Server
from kit.distil_graphs import SD, distil, run_of
from kit.flow_model import flow_lora, flow_recipe, sd3_weights
from kit.graphs import SEED, Graph, Node, error, failed, models, noise, sample
from kit.time_axis import (
    CHANNELS,
    COSMOS,
    KREA2,
    QWEN,
    WAN,
    WAN_OF_A_PICTURE,
    WIDTH,
    TimeAxis,
    one_vae,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmd_train.data.pairs import StoredPairs
from dmd_train.files.shards import Shards
from dmd_train.method.noise import EDM

EXACT = 1e-5
HALF = 5e-4
"""Relative error of what is kept in float16."""
ROUNDING = 2
"""Levels of 255: ComfyUI cuts off where it writes a picture."""
GAP = 2
"""Pixels around a picture of DMD Compare's sheet."""
MOVED = 1e-3
TIMESTEPS = torch.tensor([999, 500, 20])
SHAPE = (CHANNELS, 8, 8)
LAYOUTS = [WAN, QWEN, COSMOS, KREA2]
SHORT = SD | {
    "pair_batch_size": 2,
    "regression_warmup_steps": 0,
    "batch_size": 1,
    "timesteps": [999],
}
named = {"ids": lambda layout: layout.name}


def as_model_has(latent: Tensor) -> Tensor:
    """A LATENT (B, 16, 1, H, W) -> x0 (B, 16, H, W), by what diffusers knows of these latents."""
    known = inspect.signature(AutoencoderKLWan.__init__).parameters
    mean, std = (
        torch.tensor(known[f"latents_{key}"].default)[:, None, None] for key in ("mean", "std")
    )
    return (latent.squeeze(2) - mean) / std


def predicted(
    server: Server, graph: Graph, model: Node, text: Node, x_t: Tensor, t: Tensor, **more: Any
) -> dict[str, Tensor]:
    """The engine's mu(x_t, t) of a MODEL, its gradient, and its pictures."""
    given = {"x_t": x_t, "t": t, "row": torch.zeros_like(t)}
    save_file(given, server.base / "input/asked.safetensors")
    settings = yaml.safe_dump({"preset": "any-one-step-lora", "resolution": 64})
    wired: dict[str, Any] = {"model": model, "conditions": text, "name": "asked"}
    graph.add("Probe_PredictX0", **wired, settings=settings, **more)
    graph.shown = server.run(graph)["outputs"]
    return load_file(server.base / "output/asked.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS, **named)
def test_the_engine_predicts_what_comfyui_itself_does(server: Server, layout: TimeAxis) -> None:
    graph, x_t, sigma = Graph(), noise(3, *SHAPE), layout.noise.sigma(TIMESTEPS)
    loaded = layout.load(server, graph)
    text = layout.condition(graph)
    if isinstance(layout.noise, EDM):
        x_t = x_t * sigma.clamp(min=1).float()[:, None, None, None]
    ours = {"x": x_t[:, :, None], "sigma": sigma.float()}
    save_file(ours, server.base / "input/applied.safetensors")
    graph.add("Probe_ApplyModel", model=loaded, conditions=text, name="applied")
    found = predicted(
        server, graph, loaded, text, x_t, TIMESTEPS, vae=one_vae(server, graph), images=True
    )
    theirs = load_file(server.base / "output/applied.safetensors")["x0"]
    assert theirs.shape == (3, CHANNELS, 1, 8, 8)
    for mu, x0 in zip(found["mu"], theirs.squeeze(2), strict=True):
        assert error(mu, x0) <= EXACT
    assert found["image"].shape == (3, 3, 64, 64)
    assert found["encoded"].shape == (3, *SHAPE)
    assert found["features"].shape == (3, WIDTH, 1, 1)

    step = 0.01 * noise(1, *SHAPE, seed=1)
    beside = torch.cat([x_t[1:2], x_t[1:2] + step, x_t[1:2] - step])
    found = predicted(server, Graph(graph), loaded, text, beside, TIMESTEPS[1].repeat(3))
    slope = float((found["mu"][1] - found["mu"][2]).double().sum()) / 2
    assert slope == pytest.approx(float((found["gradient"][0] * step).double().sum()), rel=0.02)
    assert found["image"].shape == (3, 3, 8, 8)  # without a VAE, the colours of its latents


@pytest.mark.parametrize("layout", [QWEN, COSMOS, KREA2], **named)
def test_a_student_learns_from_pairs_and_is_compared_and_drawn_by_a_stock_ksampler(
    server: Server, layout: TimeAxis
) -> None:
    graph = Graph()
    loaded = layout.load(server, graph)
    text, away = layout.condition(graph), layout.condition(graph, seed=1)
    vae = one_vae(server, graph)
    before = graph.add("Probe_Weights", model=loaded, nonce=0)
    euler: dict[str, Any] = {"sampler_name": "euler", "scheduler": "simple"}
    size = {"width": 64, "height": 64}
    pairs = graph.add(
        "DMD_TeacherPairs",
        model=loaded,
        conditions=text,
        negative=away,
        **{"name": "", "count": 2, "seed": 0, "steps": 2, "cfg": 2.0, "batch_size": 2},
        **euler | size,
    )
    run = f"a student of {layout.name}"
    wired = {"negative": away, "vae": vae, "pairs": pairs}
    settings: dict[str, Any] = {"steps": 2, "resolution": 64, "rank": 4, "advanced": SHORT}
    student = distil(graph, loaded, text, run=run, **settings, **wired)
    after = graph.add("Probe_Weights", model=loaded, nonce=1, after=student)
    saved = graph.add("DMD_SaveStudent", model=student, save_as="LoRA", filename_prefix=run)
    compared = graph.add(
        "DMD_Compare",
        teacher=loaded,
        student=student,
        conditions=text,
        vae=vae,
        **{"seed": SEED, "count": 1, "teacher_steps": 2, "cfg": 1.0},
        **euler | size,
    )
    stock = graph.ksampler(student, text, graph.empty(), sampler="euler")
    teachers = graph.ksampler(loaded, text, graph.empty(), steps=2, sampler="euler")
    shown = [
        graph.add("PreviewImage", images=graph.add("VAEDecode", samples=latent, vae=vae))
        for latent in (teachers, stock)
    ]
    by_ours, by_stock, by_teacher, wide = sample(
        server,
        graph,
        graph.one_step(student, text),
        stock,
        graph.ksampler(loaded, text, graph.empty(), sampler="euler"),
        graph.add("DMD_EmptyLatent", model=loaded, width=128, height=64, batch_size=2),
    )
    assert graph.shown[before.id] == graph.shown[after.id]
    assert wide.shape == (2, CHANNELS, 1, 8, 16)
    assert by_ours.shape == (1, CHANNELS, 1, 8, 8)
    assert error(by_ours, by_stock) <= EXACT
    assert error(by_teacher, by_stock) > MOVED
    lora = load_file(run_of(server, run) / "student.safetensors")
    still = [key for key, up in lora.items() if key.endswith("lora_up.weight") and not up.any()]
    assert all(re.search(r"txt_mlp|to_add_out|add_q_proj", key) for key in still), still
    sheet = picture(server, graph, compared)
    for row, one in zip(sheet_rows(sheet, 128), shown, strict=True):
        expected = picture(server, graph, one).repeat(2, axis=0).repeat(2, axis=1)
        assert np.abs(row - expected).max() <= ROUNDING

    made = StoredPairs(Shards(server.base / after_word("output/", graph, pairs))).take(
        torch.arange(2), torch.device("cpu")
    )
    name = Path(after_word("", graph, saved).partition(": press R")[0]).name
    save_file({"noise": made.noise[:, :, None]}, server.base / "input/one-frame.safetensors")
    graph = Graph()
    loaded = layout.load(server, graph)
    text, away = layout.condition(graph), layout.condition(graph, seed=1)
    lora_model = graph.add("LoraLoaderModelOnly", model=loaded, lora_name=name, strength_model=1.0)
    steps = graph.add("BasicScheduler", model=loaded, scheduler="simple", steps=2, denoise=1.0)
    drawn = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("Probe_GivenNoise", name="one-frame"),
        guider=graph.add("CFGGuider", model=loaded, positive=text, negative=away, cfg=2.0),
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=steps,
        latent_image=graph.empty(batch=2),
    )
    by_file, of_noise = sample(
        server, graph, graph.ksampler(lora_model, text, graph.empty(), sampler="euler"), drawn
    )
    assert error(made.image, as_model_has(of_noise)) <= HALF
    start = noise(1, *SHAPE) * layout.noise.start_scale
    engines = predicted(server, Graph(graph), lora_model, text, start, TIMESTEPS[:1])["mu"]
    assert error(as_model_has(by_file), engines) <= EXACT
    assert error(by_file, by_stock) <= EXACT


def test_a_student_is_saved_whole_and_loaded_as_itself(server: Server) -> None:
    graph = Graph()
    teacher = WAN.load(server, graph)
    weights = sd3_weights(models(server, "checkpoints", "wan.safetensors"))
    lora = flow_lora(weights, ("blocks.0.self_attn.q", "blocks.0.ffn.2", "head.head"))
    metadata = flow_recipe(WAN.family).to_metadata("a student", SHAPE)
    save_file(lora, server.base / "input/wan_student.safetensors", metadata)
    student = graph.add("Probe_Student", model=teacher, name="wan_student")
    saved = graph.add("DMD_SaveStudent", model=student, save_as="UNet", filename_prefix="wan")
    text = WAN.condition(graph)
    drawn, without = sample(
        server,
        graph,
        graph.one_step(student, text),
        graph.ksampler(teacher, text, graph.empty(), sampler="euler"),
    )
    assert error(without, drawn) > MOVED
    name = Path(after_word("", graph, saved).partition(": press R")[0]).name
    graph = Graph()
    whole = graph.add("DMD_LoadCheckpoint", file=f"diffusion_models/{name}")
    (again,) = sample(server, graph, graph.one_step(whole, WAN.condition(graph)))
    assert error(again, drawn) <= HALF


@pytest.mark.parametrize("node", ["DMD_Distill", "DMD_TeacherPairs"])
def test_a_model_that_sets_a_picture_in_motion_is_refused(server: Server, node: str) -> None:
    graph = Graph()
    loaded = WAN_OF_A_PICTURE.load(server, graph)
    text = WAN.condition(graph)
    if node == "DMD_Distill":
        distil(graph, loaded, text, guidance=1.0, run="in motion", advanced=SHORT)
    else:
        wired: dict[str, Any] = {"model": loaded, "conditions": text, "name": ""}
        wired |= {"count": 2, "seed": 0, "steps": 2, "cfg": 1.0, "batch_size": 2}
        size = {"width": 64, "height": 64}
        graph.add(node, **wired, **size, sampler_name="euler", scheduler="simple")
    failure = failed(server, graph)
    assert failure.node_type == node
    assert "WAN21_I2V makes no single pictures from text. Wire a model" in failure.message


@pytest.mark.parametrize("latent_format", ["SD15", "Flux2", "Wan21"])
def test_latents_have_the_colours_of_comfyuis_own_previews(
    server: Server, latent_format: str
) -> None:
    graph = Graph()
    probe = graph.add("Probe_PreviewColours", latent_format=latent_format)
    apart, size = server.run(graph)["outputs"][probe.id]["text"]
    assert float(apart) <= 1  # it cuts levels off
    assert size == ("(12, 8)" if latent_format == "Flux2" else "(6, 4)")


def after_word(word: str, graph: Graph, node: Node) -> str:
    """What a node told, from this word on."""
    (line,) = graph.shown[node.id]["text"]
    return str(line[line.index(word) :])


def picture(server: Server, graph: Graph, node: Node) -> np.ndarray:
    """What a node showed, (H, W, 3) int."""
    (image,) = graph.shown[node.id]["images"]
    file = server.base / image["type"] / image["subfolder"] / image["filename"]
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def sheet_rows(sheet: np.ndarray, size: int) -> list[np.ndarray]:
    """The teacher's and the student's one picture of DMD Compare's sheet."""
    cell = size + 2 * GAP
    label = sheet.shape[0] // 2 - cell
    tops = [(row + 1) * label + row * cell + GAP for row in range(2)]
    return [sheet[top : top + size, GAP : GAP + size] for top in tops]
