"""DMD Distill where something cannot be: bad wiring, no memory, another model to go on with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kit.checkpoints import as_diffusers_unet, tiny_sdxl
from kit.comfy_host import Server
from kit.command_line import Command, refused
from kit.distil_graphs import (
    SD,
    SHORT,
    digits,
    distil,
    failure,
    run_of,
    sd15,
    sd15_run,
)
from kit.flow_model import tiny_sd3
from kit.graphs import (
    DIGITS_STUDENT,
    DIGITS_TEACHER,
    Graph,
    Node,
    models,
    put,
)
from kit.published import kohya, lora_of
from kit.runs import logged_steps, newest, newest_step
from safetensors.torch import load_file, save_file

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
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)
    distil(graph, model, graph.condition("sd15"), advanced=SHORT)


def no_class_at_all(server: Server, graph: Graph) -> None:
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)
    distil(graph, model, graph.classes(""), advanced=SHORT)


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
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT)
    distil(graph, model, graph.classes(), advanced=SHORT)


def no_layer_for_an_adapter(server: Server, graph: Graph) -> None:
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)
    bare = graph.add("Probe_NoLayers", model=model)
    distil(
        graph,
        bare,
        graph.classes(),
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
    tight = graph.add("Probe_OutOfMemory", model=loaded, call=45)
    settings = {"run": "tight again", "steps": 16, "advanced": SD | {"checkpoint_every": 2}}
    sd15_run(server, graph, tight, **settings)
    message = failure(server, graph)
    assert "out of memory. Its checkpoints are kept. Set micro_batch_size: 1." in message
    kept = newest_step(run)
    assert 0 < kept < 16
    server.run(graph)  # the probe fails but once
    steps = logged_steps(run)
    assert steps == list(range(1, 17))


def test_a_run_of_a_patched_model_is_continued_with_that_model_and_no_other(
    server: Server, dmd: Command
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

    newest(run).unlink()
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

    newest(run).unlink()
    refused(dmd("train", run / "run.yaml"), "Go on with the run there.")
