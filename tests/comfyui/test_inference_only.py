"""A ComfyUI in which nothing is installed that only training needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kit.adm import adm_state
from kit.comfy_host import PACK, PACK_NAME, PROBE_NODES, Server
from kit.graphs import DIGITS_STUDENT, DIGITS_TEACHER, Graph, error, failed, models, noise, sample

from dmd_train.method.sample import sample_student
from dmd_train.networks.load import load

HIDDEN_EXTRAS = PROBE_NODES.with_name("hidden_extras")
NODES = {
    *("DMD_LoadCheckpoint", "DMD_LoadLoRA", "DMD_ModelSampling"),
    *("DMD_OneStepSampler", "DMD_EmptyLatent", "DMD_ClassLabel"),
    *("DMD_Prompts", "DMD_TeacherPairs", "DMD_Distill", "DMD_ContinueRun"),
    *("DMD_Compare", "DMD_SaveStudent"),
}


@pytest.fixture(scope="module")
def bare() -> Iterator[Server]:
    with Server([HIDDEN_EXTRAS, PROBE_NODES]) as running:
        yield running


def test_every_node_is_there_without_the_training_extras(bare: Server) -> None:
    assert bare.object_info().keys() >= NODES


def test_importing_the_nodes_touches_no_network_no_process_and_no_gpu(bare: Server) -> None:
    lines = (bare.base / "output/witnessed.txt").read_text().splitlines()
    seen = [line.split() for line in lines]
    assert ["hidden_extras", "torch.cuda.is_available"] in seen
    assert ["hidden_extras", "socket.connect"] in seen
    assert [event for pack, event in seen if pack == PACK_NAME] == []


def test_the_digits_student_samples_without_the_training_extras(bare: Server) -> None:
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS_STUDENT)
    classes = graph.classes()
    latent = graph.one_step(model, classes, 0, 0, 10)
    decoded = graph.add("VAEDecode", samples=latent, vae=model[2])
    picture = graph.add("SaveImage", images=decoded, filename_prefix="digits")
    (sampled,) = sample(bare, graph, latent)
    loaded = load(str(PACK / "students/digits-one-step.safetensors"), torch.device("cpu"))
    assert loaded.recipe
    with torch.no_grad():
        expected = sample_student(
            loaded.network, loaded.recipe, {"label": torch.arange(10)}, [noise(10, 1, 8, 8)]
        )
    assert error(sampled, expected) <= 1e-4
    assert len(graph.shown[picture.id]["images"]) == 10


def test_training_without_its_libraries_names_one_and_the_way_out(bare: Server) -> None:
    graph = Graph()
    graph.add(
        "DMD_Distill",
        model=graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER),
        conditions=graph.classes(),
        preset="right for the model",
        steps=1,
        resolution=0,
        guidance=0.0,
        rank=0,
        seed=0,
        run="",
        advanced="training: lora",
    )
    message = failed(bare, graph).message
    assert "training needs" in message
    assert "which is not installed. Run pip install -r" in message


def test_a_file_that_needs_a_missing_library_names_it_and_the_way_out(bare: Server) -> None:
    state = adm_state(64, [128, 128], 1, set(), 1000)
    torch.save(state, models(bare, "checkpoints", "pytorch_model.bin"))
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file="checkpoints/pytorch_model.bin")
    graph.add("Probe_Sigmas", sigmas=graph.model_sampling(model)[2])
    message = failed(bare, graph).message
    assert "needs diffusers, which is not installed" in message
    assert "pip install -r" in message
