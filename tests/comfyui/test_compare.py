"""DMD Compare: its pictures are those of the samplers, its numbers those of the run."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from kit.checkpoints import tiny_sd15, tiny_sdxl
from kit.comfy_host import Server
from kit.flow_model import flow_lora, flow_recipe, sd3_weights, text_condition, tiny_sd3
from kit.graphs import DIGITS_STUDENT, DIGITS_TEACHER, SEED, Graph, Node, failed, put
from PIL import Image
from safetensors.torch import save_file

GAP = 2
ROUNDING = 2
"""Levels of 255: ComfyUI cuts off where it writes a picture."""


def compare(graph: Graph, teacher: Any, student: Any, conditions: Node, **more: Any) -> Node:
    """The node with settings that are quick on a tiny network."""
    settings: dict[str, Any] = {
        "seed": SEED,
        "count": 0,
        "teacher_steps": 3,
        "cfg": 1.0,
        "sampler_name": "heun",
        "scheduler": "karras",
        "width": 0,
        "height": 0,
    }
    return graph.add(
        "DMD_Compare",
        teacher=teacher,
        student=student,
        conditions=conditions,
        **(settings | more),
    )


def digits(graph: Graph) -> tuple[Node, Node]:
    return (
        graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER),
        graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT),
    )


def sd15(server: Server, graph: Graph, timesteps: str = "999") -> tuple[Node, Node]:
    """A tiny network as its own teacher."""
    teacher = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))
    return teacher, graph.model_sampling(teacher, "custom timesteps", timesteps)


def seen(server: Server, graph: Graph, node: Node) -> list[np.ndarray]:
    """What a node of the graph showed when it ran, (H, W, 3) int."""
    folders = {"temp": server.base / "temp", "output": server.base / "output"}
    images = graph.shown[node.id]["images"]
    files = [folders[image["type"]] / image["subfolder"] / image["filename"] for image in images]
    return [np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files]


def run(server: Server, graph: Graph) -> None:
    graph.shown = server.run(graph)["outputs"]


def captions(graph: Graph, node: Node) -> tuple[str, str]:
    teacher, student = graph.shown[node.id]["text"]
    return teacher, student


def rows(sheet: np.ndarray, count: int, size: int) -> list[np.ndarray]:
    """The teacher's and the student's `count` pictures, each (count, size, size, 3)."""
    cell = size + 2 * GAP
    label = sheet.shape[0] // 2 - cell
    found = []
    for row in range(2):
        top = (row + 1) * label + row * cell + GAP
        lefts = [i * cell + GAP for i in range(count)]
        found.append(np.stack([sheet[top : top + size, x : x + size] for x in lefts]))
    return found


def test_the_sheet_shows_what_ksampler_and_our_sampler_draw_from_that_seed(server: Server) -> None:
    graph = Graph()
    teacher, student = digits(graph)
    classes = graph.classes()
    compared = compare(graph, teacher, student, classes)
    beside = graph.add("DMD_EmptyLatent", model=teacher, width=0, height=0, batch_size=10)
    stock = graph.ksampler(teacher, classes, beside, steps=3, sampler="heun", scheduler="karras")
    ours = graph.one_step(student, classes, 0, 0, 10)
    shown = []
    for latent, model in ((stock, teacher), (ours, student)):
        images = graph.add("VAEDecode", samples=latent, vae=model[2])
        shown.append(graph.add("PreviewImage", images=images))
    run(server, graph)
    (sheet,) = seen(server, graph, compared)
    by_teacher, by_student = rows(sheet, 10, 128)
    assert np.abs(by_teacher - by_student).max() > 50
    for row, node in zip((by_teacher, by_student), shown, strict=True):
        expected = np.stack(seen(server, graph, node)).repeat(16, axis=1).repeat(16, axis=2)
        assert np.abs(row - expected).max() <= ROUNDING


def test_the_nfe_are_those_of_the_networks_in_this_run(server: Server) -> None:
    """heun: two evaluations a step but the last. cfg: twice as many."""
    graph = Graph()
    teacher, student = digits(graph)
    classes = graph.classes("3, 7")
    none = graph.classes("")
    alone = compare(graph, teacher, student, classes)
    guided = compare(graph, teacher, student, classes, cfg=2.5, negative=none)
    watched = graph.add("Probe_Watch", model=teacher, name="compared", seconds=0.0)
    many = compare(graph, watched, student, classes, count=5, teacher_steps=4, sampler_name="euler")
    told = graph.add("Probe_Calls", name="compared")
    run(server, graph)
    assert captions(graph, alone)[0].startswith("teacher: 5 NFE, ")
    assert captions(graph, alone)[0].endswith(" (heun, karras, 3 steps, cfg 1)")
    assert captions(graph, guided)[0].startswith("teacher: 10 NFE, ")
    assert captions(graph, many)[0].startswith("teacher: 4 NFE, ")
    for node in (alone, guided, many):
        assert captions(graph, node)[1].startswith("student: 1 NFE, ")
    run(server, graph)
    calls = graph.shown[told.id]["calls"]
    assert calls == [1 + 5 * 4]  # the first warms up


def test_the_seconds_are_of_sampling_and_not_of_warming_up(server: Server) -> None:
    graph = Graph()
    teacher, student = digits(graph)
    slow = graph.add("Probe_Watch", model=teacher, name="slow teacher", seconds=0.2)
    slow_student = graph.add("Probe_Watch", model=student, name="slow student", seconds=0.05)
    classes = graph.classes("1")
    node = compare(graph, slow, slow_student, classes, sampler_name="euler", teacher_steps=2)
    run(server, graph)
    by_teacher, by_student = captions(graph, node)
    seconds = [
        float(re.search(r"([\d.]+) s an image", caption)[1])  # type: ignore[index]
        for caption in (by_teacher, by_student)
    ]
    assert 0.4 <= seconds[0] < 2  # what the first call alone takes
    assert 0.05 <= seconds[1] < 2
    (sheet,) = seen(server, graph, node)
    assert sheet.shape[1] > 128 + 2 * GAP  # one picture is narrower than its caption
    assert sheet[:, -1].min() == 255
    faster = float(re.search(r"([\d.]+)x faster", by_student)[1])  # type: ignore[index]
    assert faster == pytest.approx(seconds[0] / seconds[1], abs=0.06)


def test_each_prompt_of_a_combined_condition_is_drawn_and_guided_as_ksampler_does(
    server: Server,
) -> None:
    """64 px, the preview colours of 8 x 8 latents: the same as of the stock sampler's latents."""
    graph = Graph()
    teacher, student = sd15(server, graph, "999, 499")
    first, second, empty = (graph.condition("sd15", seed) for seed in (1, 2, 3))
    both = graph.add("ConditioningCombine", conditioning_1=first, conditioning_2=second)
    vae = teacher[2]
    size = {"width": 64, "height": 64}
    guided = {"cfg": 4.0, "sampler_name": "dpmpp_2m", "negative": empty}
    node = compare(graph, teacher, student, both, **size, **guided, vae=vae, count=3)
    plain = compare(graph, teacher, student, both, **size, **guided)
    shown = []
    for i, text in enumerate((first, second, first)):
        one = graph.add("LatentFromBatch", samples=graph.empty(batch=3), batch_index=i, length=1)
        stock = graph.ksampler(
            teacher,
            text,
            one,
            steps=3,
            sampler="dpmpp_2m",
            scheduler="karras",
            negative=empty,
            cfg=4.0,
        )
        for latent in (stock, graph.one_step(student, text, latent=one)):
            images = graph.add("VAEDecode", samples=latent, vae=vae)
            shown.append(graph.add("PreviewImage", images=images))
    run(server, graph)
    assert captions(graph, node)[0].startswith("teacher: 6 NFE, ")
    assert captions(graph, node)[1].startswith("student: 2 NFE, ")
    (sheet,) = seen(server, graph, node)
    by_teacher, by_student = rows(sheet, 3, 128)
    for row, nodes in ((by_teacher, shown[::2]), (by_student, shown[1::2])):
        expected = np.concatenate([np.stack(seen(server, graph, one)) for one in nodes])
        expected = expected.repeat(2, axis=1).repeat(2, axis=2)
        assert np.abs(row - expected).max() <= ROUNDING
        assert np.abs(row[0] - row[1]).max() > 5
    (small,) = seen(server, graph, plain)
    previews = rows(small, 2, 128)[0]
    assert np.array_equal(previews, previews[:, ::16, ::16].repeat(16, axis=1).repeat(16, axis=2))
    assert previews.std() > 5


def test_a_flow_model_is_compared_in_its_own_latents(server: Server) -> None:
    """16 channels, whose colours are shifted; the LATENTs of the stock nodes have the shift."""
    graph = Graph()
    teacher = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd3))
    path = server.base / "input/flow_student.safetensors"
    weights = sd3_weights(server.base / "models/checkpoints" / put(server, tiny_sd3))
    save_file(flow_lora(weights), path, flow_recipe().to_metadata("a student", (16, 8, 8)))
    student = graph.add("Probe_Student", model=teacher, name=path.stem)
    text = text_condition(graph, "SD3")
    size = {"width": 64, "height": 64, "sampler_name": "euler", "scheduler": "simple"}
    node = compare(graph, teacher, student, text, **size, vae=teacher[2])
    compare(graph, teacher, student, text, **size)
    stock = graph.ksampler(teacher, text, graph.empty(), steps=3, sampler="euler")
    shown = []
    for latent in (stock, graph.one_step(student, text)):
        images = graph.add("VAEDecode", samples=latent, vae=teacher[2])
        shown.append(graph.add("PreviewImage", images=images))
    run(server, graph)
    assert captions(graph, node)[0].startswith("teacher: 3 NFE, ")
    (sheet,) = seen(server, graph, node)
    for row, one in zip(rows(sheet, 1, 128), shown, strict=True):
        expected = np.stack(seen(server, graph, one)).repeat(2, axis=1).repeat(2, axis=2)
        assert np.abs(row - expected).max() <= ROUNDING


def test_what_cannot_be_compared_is_refused_before_anything_is_sampled(server: Server) -> None:
    graph = Graph()
    teacher, student = sd15(server, graph)
    text = graph.condition("sd15")
    compare(graph, teacher, student, text, cfg=7.5)
    assert "there is none: wire negative, or set cfg to 1" in failed(server, graph).message

    graph = Graph()
    teacher, _ = sd15(server, graph)
    compare(graph, teacher, teacher, graph.condition("sd15"))
    assert "does not say in how many steps it samples" in failed(server, graph).message

    graph = Graph()
    _, student = sd15(server, graph)
    other = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sdxl))
    compare(graph, other, student, graph.condition("sd15"))
    assert (
        "draw different latents (SDXL, 4 channels; SD15, 4 channels)"
        in failed(server, graph).message
    )
