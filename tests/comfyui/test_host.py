"""The ground the other tests stand on: a stock graph, exact to a formula, in a real ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kit.checkpoints import tiny_sd2_eps, tiny_sd2_v, tiny_sd15, tiny_sdxl
from kit.comfy_host import PromptRefused, Server
from kit.graphs import (
    NO_NOISE,
    Graph,
    Node,
    by_diffusers,
    error,
    failed,
    models,
    noise,
    put,
    sample,
    unet_of,
)

LAST = 999  # the timestep at which a one-step sample starts


def one_step(graph: Graph, family: str, checkpoint: str) -> Node:
    """Noise to latent in one stock KSampler step at cfg 1, for 64 x 64 pixels."""
    model = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    return graph.ksampler(model, graph.condition(family), graph.empty(), sampler="euler")


@pytest.mark.parametrize(
    ("make", "family"),
    [(tiny_sd15, "sd15"), (tiny_sd2_eps, "sd2"), (tiny_sd2_v, "sd2v"), (tiny_sdxl, "sdxl")],
)
def test_one_stock_step_is_what_diffusers_lcm_scheduler_makes_of_the_same_weights(
    server: Server, make: Callable[[Path], None], family: str
) -> None:
    graph, checkpoint = Graph(), put(server, make)
    (sampled,) = sample(server, graph, one_step(graph, family, checkpoint))
    unet = unet_of(models(server, "checkpoints", checkpoint))
    expected = by_diffusers(unet, family, [LAST], noise(1, 4, 8, 8), NO_NOISE)
    assert error(sampled, expected) < 1e-5


def test_a_prompt_that_validation_refuses_names_the_node_and_its_input(server: Server) -> None:
    graph = Graph()
    with pytest.raises(PromptRefused) as refusal:
        sample(server, graph, one_step(graph, "sd15", "no such file.safetensors"))
    (refused,) = refusal.value.node_errors.values()
    assert refused["class_type"] == "CheckpointLoaderSimple"
    assert [error["extra_info"]["input_name"] for error in refused["errors"]] == ["ckpt_name"]


def test_a_node_that_raises_fails_the_prompt_with_its_own_words(server: Server) -> None:
    graph = Graph()
    latent = one_step(graph, "sd15", put(server, tiny_sd15))
    graph.add("Probe_SaveLatent", latent=latent, name="../elsewhere")
    failure = failed(server, graph)
    assert "not a plain file name" in failure.message
    assert failure.node_type == "Probe_SaveLatent"
