"""DMD Teacher Pairs: what a stock sampler makes of the same noise, kept, and never mixed up."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.checkpoints import tiny_sd15
from kit.comfy_host import PromptFailed, Server
from kit.graphs import (
    DIGITS_TEACHER,
    LATENT_SCALE,
    Graph,
    Node,
    error,
    failed,
    models,
    put,
    sample,
    unet_of,
)
from kit.published import kohya, lora_of
from safetensors import safe_open
from safetensors.torch import save_file

from dmd_train.data.pairs import PairBatch, StoredPairs
from dmd_train.files.shards import ORIGIN_KEY, Shards
from dmd_train.method.sample import sample_heun
from dmd_train.networks.load import DIGITS_TEACHER as TEACHER_FILE
from dmd_train.networks.load import load

CPU = torch.device("cpu")
HALF = 5e-4
"""Relative error of what is kept in float16."""
QUICK: dict[str, Any] = {"count": 4, "steps": 2, "cfg": 1.0}


def teacher_pairs(graph: Graph, model: Any, conditions: Any, **inputs: Any) -> Node:
    usual = {
        **{"name": "", "count": 500, "seed": 0, "steps": 30, "cfg": 7.5, "batch_size": 4},
        **{"sampler_name": "dpmpp_2m", "scheduler": "karras", "width": 64, "height": 64},
    }
    return graph.add(
        "DMD_TeacherPairs", model=model, conditions=conditions, **usual | QUICK | inputs
    )


def digits(graph: Graph, labels: str = "0-9", model: Any = None, **inputs: Any) -> Node:
    """Pairs of the embedded teacher, at its own size."""
    loaded = model or graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)
    classes = graph.add("DMD_ClassLabel", labels=labels)
    return teacher_pairs(graph, loaded, classes, width=0, height=0, **inputs)


def folder_of(server: Server, graph: Graph, pairs: Node) -> Path:
    """Where a graph that has run put them."""
    (line,) = graph.shown[pairs.id]["text"]
    return server.base / line[line.index("output/") :]


def run(server: Server, graph: Graph, pairs: Node) -> Path:
    graph.shown = server.run(graph)["outputs"]
    return folder_of(server, graph, pairs)


def refusal(server: Server, graph: Graph) -> str:
    failure = failed(server, graph)
    assert failure.node_type == "DMD_TeacherPairs"
    return failure.message


def read(folder: Path) -> PairBatch:
    pairs = StoredPairs(Shards(folder))
    return pairs.take(torch.arange(len(pairs)), CPU)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("shard-*")}


def origin(folder: Path) -> list[Any]:
    with safe_open(folder / "shard-00000.safetensors", "pt") as file:
        told: list[Any] = json.loads(file.metadata()[ORIGIN_KEY])
    return told


def combined(graph: Graph, *conditions: Node) -> Node:
    whole, *more = conditions
    for condition in more:
        whole = graph.add("ConditioningCombine", conditioning_1=whole, conditioning_2=condition)
    return whole


def sd15(server: Server, graph: Graph) -> Node:
    return graph.add("CheckpointLoaderSimple", ckpt_name=put(server, tiny_sd15))


@pytest.mark.parametrize("lengths", ["one length", "two lengths"])
@pytest.mark.parametrize(("sampler", "cfg"), [("dpmpp_2m", 3.0), ("euler", 1.0)])
def test_each_image_is_what_stock_samplers_make_of_its_noise_its_prompt_and_the_negative(
    server: Server, lengths: str, sampler: str, cfg: float
) -> None:
    graph = Graph()
    model, negative = sd15(server, graph), graph.condition("sd15", seed=3)
    prompts = [graph.condition("sd15", seed=seed) for seed in (1, 2)]
    if lengths == "two lengths":  # which are no batch
        longer = graph.add(
            "ConditioningConcat", conditioning_to=prompts[1], conditioning_from=negative
        )
        prompts[1] = longer
    inputs = {"count": 6, "steps": 3, "cfg": cfg, "sampler_name": sampler, "seed": 3}
    pairs = teacher_pairs(graph, model, combined(graph, *prompts), negative=negative, **inputs)
    made = read(run(server, graph, pairs))
    assert made.row.unique().tolist() == [0, 1]
    assert made.noise.shape == made.image.shape == (6, 4, 8, 8)
    assert 0.9 < made.noise.std() < 1.1

    graph = Graph(graph)
    name = graph.add("KSamplerSelect", sampler_name=sampler)
    sigmas = graph.add("BasicScheduler", model=model, scheduler="karras", steps=3, denoise=1.0)
    stock = []
    for row, prompt in enumerate(prompts):
        own = made.noise[made.row == row]
        save_file({"noise": own}, server.base / f"input/noise-{row}.safetensors")
        latent = graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("Probe_GivenNoise", name=f"noise-{row}"),
            guider=graph.add("CFGGuider", model=model, positive=prompt, negative=negative, cfg=cfg),
            sampler=name,
            sigmas=sigmas,
            latent_image=graph.empty(batch=len(own)),
        )
        stock.append(latent)
    for row, latents in enumerate(sample(server, graph, *stock)):
        expected = latents * LATENT_SCALE["sd15"]
        assert error(made.image[made.row == row], expected) < HALF


def test_different_prompts_of_one_length_are_drawn_at_once(server: Server) -> None:
    graph = Graph()
    watched = graph.add("Probe_Watch", model=sd15(server, graph), name="at once", seconds=0.0)
    prompts = combined(graph, *(graph.condition("sd15", seed=seed) for seed in range(3)))
    made = read(run(server, graph, teacher_pairs(graph, watched, prompts, count=8)))
    assert len(made.row[:4].unique()) > 1 and len(made.row[4:].unique()) > 1
    graph = Graph()
    told = graph.add("Probe_Calls", name="at once")
    assert server.run(graph)["outputs"][told.id]["calls"] == [2 * QUICK["steps"]]


def test_pairs_of_some_classes_are_the_engines_own_heun_on_the_same_noise_and_labels(
    server: Server,
) -> None:
    graph, teacher = Graph(), load(str(TEACHER_FILE), CPU).network
    how = {"steps": 18, "sampler_name": "heun", "count": 30, "batch_size": 7}
    made = read(run(server, graph, digits(graph, "3, 7", **how)))
    labels = torch.tensor([3, 7])[made.row]
    assert labels.unique().tolist() == [3, 7]
    expected = sample_heun(teacher, made.noise, {"label": labels}, steps=18)
    assert error(made.image, expected) < HALF


def test_the_same_settings_make_the_same_files_and_another_seed_others(server: Server) -> None:
    found = []
    for name, seed in (("first", 5), ("again", 5), ("other", 6)):
        graph = Graph()
        found.append(contents(run(server, graph, digits(graph, name=name, seed=seed))))
    assert found[0] == found[1]
    assert found[0].keys() == found[2].keys()
    assert all(found[0][name] != found[2][name] for name in found[0])


def test_what_was_made_before_a_stop_is_kept_and_the_whole_is_as_if_there_had_been_none(
    server: Server,
) -> None:
    def slow(name: str) -> tuple[Graph, Node]:
        graph = Graph()
        loaded = graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)
        watched = graph.add("Probe_Watch", model=loaded, name="pairs", seconds=0.05)
        # an ancestral sampler, whose own noise must be the same as well
        how = {"steps": 4, "count": 1100, "batch_size": 125, "sampler_name": "euler_ancestral"}
        return graph, digits(graph, model=watched, name=name, **how)

    graph, pairs = slow("stopped")
    folder = server.base / "output/dmd_pairs/stopped"
    prompt_id = server.submit(graph)
    until(lambda: (folder / "shard-00000.safetensors").exists())
    server.interrupt()
    with pytest.raises(PromptFailed) as failure:
        server.wait(prompt_id)
    assert failure.value.event == "execution_interrupted"
    kept = contents(folder)
    assert 1 <= len(kept) < 3
    when = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    assert run(server, graph, pairs) == folder
    graph, pairs = slow("whole")
    whole = contents(run(server, graph, pairs))
    assert len(whole) == 3
    assert contents(folder) == whole
    assert kept.items() <= whole.items()
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == when


def until(is_so: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_larger_count_adds_to_the_pairs_that_are_there_and_drops_what_a_kill_left(
    server: Server,
) -> None:
    half = server.base / "output/dmd_pairs/more/.shard-00000-0123456789abcdef.safetensors"
    for count in (3, 8):
        if count == 8:
            half.write_bytes(b"half")
        graph = Graph()
        made = read(run(server, graph, digits(graph, name="more", count=count)))
        if count == 3:
            few = made
    assert len(made.row) == 8 and not half.exists()
    assert torch.equal(made.noise[:3], few.noise)
    assert error(made.image[:3], few.image) < HALF


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("labels", {"labels": "0-8"}),
        ("seed", {"seed": 1}),
        ("steps", {"steps": 3}),
        ("sampler", {"sampler_name": "euler"}),
        ("scheduler", {"scheduler": "normal"}),
        ("cfg", {"cfg": 2.0}),
    ],
)
def test_pairs_of_other_settings_are_never_mixed_in(
    server: Server, kind: str, changed: dict[str, Any]
) -> None:
    """In a folder of their own by default; refused in one that is named."""
    if "cfg" in changed:
        changed = changed | {"negative": "no class"}

    def made(name: str, changed: dict[str, Any]) -> tuple[Graph, Node]:
        graph = Graph()
        if "negative" in changed:
            changed = changed | {"negative": graph.classes("")}
        return graph, digits(graph, name=name, **changed)

    folders = [run(server, *made("", own)) for own in ({}, changed)]
    assert folders[0] != folders[1]
    before = contents(run(server, *made(f"named {kind}", {})))
    message = refusal(server, made(f"named {kind}", changed)[0])
    assert "made by another teacher, from other prompts or by other settings" in message
    assert contents(server.base / f"output/dmd_pairs/named {kind}") == before


def test_other_texts_of_the_same_length_are_other_conditions(server: Server) -> None:
    graph = Graph()
    model, first, second = (
        sd15(server, graph),
        graph.condition("sd15", seed=1),
        graph.condition("sd15", seed=2),
    )
    one = teacher_pairs(graph, model, first)
    other = teacher_pairs(graph, model, second)
    again = teacher_pairs(graph, model, graph.condition("sd15", seed=1), batch_size=2)
    folder = run(server, graph, one)
    assert folder_of(server, graph, other) != folder
    assert folder_of(server, graph, again) == folder


class Patches:
    """What a user may wire between a loader and the pairs."""

    def __init__(self, server: Server) -> None:
        lora = lora_of(unet_of(server.base / "models/checkpoints" / put(server, tiny_sd15)), rank=2)
        save_file(kohya(lora, alpha=1.0), models(server, "loras", "pairs.safetensors"))

    def lora(self, graph: Graph, model: Node, strength: float) -> Node:
        name = "pairs.safetensors"
        return graph.add(
            "LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength
        )

    def merge(self, graph: Graph, model: Node, ratio: float) -> Node:
        other = self.lora(graph, model, 1.0)
        return graph.add("ModelMergeSimple", model1=model, model2=other, ratio=ratio)

    def rescaled(self, graph: Graph, model: Node, multiplier: float) -> Node:
        return graph.add("RescaleCFG", model=model, multiplier=multiplier)

    def free_u(self, graph: Graph, model: Node, b1: float) -> Node:
        return graph.add("FreeU_V2", model=model, b1=b1, b2=1.4, s1=0.9, s2=0.2)

    def sampling(self, graph: Graph, model: Node, zsnr: float) -> Node:
        return graph.add(
            "ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=bool(zsnr)
        )


def test_the_model_is_named_by_its_patches_and_not_by_whether_it_is_loaded(server: Server) -> None:
    patches, seeds = Patches(server), iter(range(1000))

    def name(patch: Callable[[Graph, Node, float], Node] | None, value: float) -> str:
        """A seed of its own, or the answer would come out of the cache."""
        graph = Graph()
        model = sd15(server, graph)
        model = patch(graph, model, value) if patch else model
        how = {"seed": next(seeds), "count": 1, "steps": 1, "cfg": 1.0}
        folder = run(server, graph, teacher_pairs(graph, model, graph.condition("sd15"), **how))
        named: str = origin(folder)[0]
        shutil.rmtree(folder)
        return named

    server.post("/free", {"unload_models": True, "free_memory": True})
    ways = [
        (None, 0.0),
        *((patches.lora, value) for value in (0.5, 1.0)),
        *((patches.merge, value) for value in (0.25, 0.75)),
        *((patches.rescaled, value) for value in (0.5, 0.7)),
        *((patches.free_u, value) for value in (1.1, 1.3)),
        *((patches.sampling, value) for value in (0.0, 1.0)),
    ]
    before = [name(*way) for way in ways]
    assert len(set(before)) == len(ways)
    assert [name(*way) for way in reversed(ways)] == before[::-1]
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert [name(*way) for way in ways[:3]] == before[:3]


def test_another_checkpoint_of_the_same_shape_is_another_model(server: Server) -> None:
    def other_teacher(path: Path) -> None:
        tiny_sd15(path, seed=1)

    folders = []
    for make in (tiny_sd15, other_teacher):
        graph = Graph()
        loaded = graph.add("CheckpointLoaderSimple", ckpt_name=put(server, make))
        folders.append(run(server, graph, teacher_pairs(graph, loaded, graph.condition("sd15"))))
    assert folders[0] != folders[1]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".hidden", "x.", "a\\b", "a:b"])
def test_pairs_never_leave_their_folder(server: Server, name: str) -> None:
    graph = Graph()
    digits(graph, name=name)
    before = {path for path in server.base.rglob("*") if "dmd_pairs" in path.parts}
    assert f"name: '{name}' is no name of a folder" in refusal(server, graph)
    assert {path for path in server.base.rglob("*") if "dmd_pairs" in path.parts} == before


def test_guidance_without_one_negative_is_refused(server: Server) -> None:
    graph = Graph()
    digits(graph, cfg=3.0)
    assert "negative: nothing is wired, cfg 3 needs one" in refusal(server, graph)
    graph = Graph()
    digits(graph, cfg=3.0, negative=graph.classes("0-1"))
    assert "negative: 2 conditions are wired, cfg 3 needs one" in refusal(server, graph)


def area(graph: Graph, condition: Node) -> Node:
    where = {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0}
    return graph.add("ConditioningSetArea", conditioning=condition, **where)


def mask(graph: Graph, condition: Node) -> Node:
    drawn = graph.add("SolidMask", value=1.0, width=64, height=64)
    how = {"strength": 1.0, "set_cond_area": "default"}
    return graph.add("ConditioningSetMask", conditioning=condition, mask=drawn, **how)


def late(graph: Graph, condition: Node) -> Node:
    return graph.add("ConditioningSetTimestepRange", conditioning=condition, start=0.5, end=1.0)


@pytest.mark.parametrize(
    ("more", "named"), [(area, "an area"), (mask, "a mask"), (late, "a range of timesteps")]
)
def test_a_condition_that_is_more_than_a_prompt_is_refused(
    server: Server, more: Callable[[Graph, Node], Node], named: str
) -> None:
    graph = Graph()
    model, plain = sd15(server, graph), graph.condition("sd15")
    teacher_pairs(graph, model, combined(graph, plain, more(graph, plain)))
    assert f"conditioning: entry 2 has {named}" in refusal(server, graph)


def test_a_whole_range_of_timesteps_is_a_plain_prompt(server: Server) -> None:
    graph = Graph()
    whole = graph.add(
        "ConditioningSetTimestepRange", conditioning=graph.condition("sd15"), start=0.0, end=1.0
    )
    pairs = teacher_pairs(graph, sd15(server, graph), whole)
    assert len(read(run(server, graph, pairs)).row) == 4
