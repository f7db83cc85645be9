"""A workflow may come from anybody: what its texts may set, and what they may be called."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.comfy_host import PromptFailed, Server
from kit.graphs import Graph, Node

DIGITS = "dmd_students/digits-teacher.safetensors"


def refused(server: Server, graph: Graph) -> str:
    """The one line that a node ended with."""
    with pytest.raises(PromptFailed) as failed:
        server.run(graph)
    message = failed.value.message
    assert message.strip().isprintable() and len(message) <= 1000
    return message


def digits(graph: Graph, advanced: str = "", run: str = "refused") -> Node:
    return graph.add(
        "DMD_Distill",
        model=graph.add("DMD_LoadCheckpoint", file=DIGITS),
        conditions=graph.add("DMD_ClassLabel", labels="0-9"),
        preset="digits-one-step",
        steps=2,
        resolution=0,
        guidance=0.0,
        rank=0,
        seed=0,
        run=run,
        advanced=advanced,
    )


def output(server: Server) -> set[Path]:
    return set((server.base / "output").rglob("*"))


@pytest.mark.parametrize(
    ("advanced", "words"),
    [
        *((f"{key}: x", f"{key} is set by the graph") for key in ("output", "prompts", "teacher")),
        ("decoder: /etc/passwd", "decoder: a workflow names no files"),
        ("trackers: [wandb]", "wandb sends data, which no workflow may ask for"),
        ("trackers: wandb", "wandb sends data"),
        ('{"trackers": ["tensorboard", "wandb"]}', "wandb sends data"),
        ("steps: &a 1\npairs: *a", "aliases are not read here"),
        ("pairs: !!python/object/apply:os.system [touch x]", "tags (!) are not read here"),
        ("pairs: 1\npairs: 2", "'pairs' is there twice"),
        ("pairs: 2024-99-99", "pairs: input should be a valid integer"),
        ("[" * 3000, "nested more than 20 deep"),
        ("pairs: " + "9" * 5000, "a number of too many digits"),
        ("pairs: 1e30", "pairs: "),
        ("learning_rate: .nan", "learning_rate: "),
        ("[pairs, 5]", "write one 'key: value' a line"),
    ],
)
def test_the_advanced_box_takes_plain_settings_and_no_path_and_sends_nothing(
    server: Server, advanced: str, words: str
) -> None:
    graph, before = Graph(), output(server)
    digits(graph, advanced)
    assert words in refused(server, graph)
    assert output(server) == before


def test_the_advanced_box_takes_comments_and_settings(server: Server) -> None:
    graph = Graph()
    digits(graph, "# small\npairs: 20\npair_batch_size: 4\ncpu_threads: 1", run="plain words")
    server.run(graph)
    assert (server.base / "output/dmd_runs/plain words/student.safetensors").exists()


@pytest.mark.parametrize(
    "run", ["CON", "nul.txt", "com1", "x" * 300, "a\0b", "\ud800", "x ", "a\nb"]
)
def test_a_run_is_called_what_every_system_takes(server: Server, run: str) -> None:
    graph, before = Graph(), output(server)
    digits(graph, run=run)
    assert "is no name of a folder" in refused(server, graph)
    assert output(server) == before


@pytest.mark.parametrize("prompt", ["half a \ud800", "a\0b", "x" * 10_001])
def test_a_prompt_that_no_encoder_can_be_told_is_named(server: Server, prompt: str) -> None:
    graph = Graph()
    clip = graph.add("Probe_RandomClip", family="sd15")
    told = graph.add("DMD_Prompts", clip=clip, source="the text below", text=f"a fox\n{prompt}")
    graph.add("Probe_SaveConditions", conditioning=told, name="refused")
    assert "the text below: the prompt " in refused(server, graph)


def lora(server: Server, file: object) -> str:
    graph = Graph()
    model = graph.add("DMD_LoadCheckpoint", file=DIGITS)
    wire = graph.add("DMD_LoadLoRA", model=model, file=file, strength=1.0)
    graph.add("PreviewAny", source=wire)
    return refused(server, graph)


@pytest.mark.parametrize("file", ["\x1b[31mred\r\n.safetensors", "../x", 7, "half a \ud800"])
def test_a_file_that_is_not_there_is_named_as_a_page_may_show_it(
    server: Server, file: object
) -> None:
    """ComfyUI itself names it as it is; over half a character its worker dies."""
    assert "no such file. Press R" in lora(server, file)


@pytest.mark.parametrize("file", [-1, "checkpoints/\x1b[31m", "dmd_students/../../x"])
def test_a_checkpoint_that_is_not_offered_is_refused(server: Server, file: object) -> None:
    graph = Graph()
    graph.add("PreviewAny", source=graph.add("DMD_LoadCheckpoint", file=file))
    assert "no such file. Press R" in refused(server, graph)


@pytest.mark.parametrize("labels", ["0-999999999", "9" * 30, ", ".join(["0-99999"] * 2)])
def test_labels_beyond_any_model_are_refused_before_they_are_counted(
    server: Server, labels: str
) -> None:
    graph = Graph()
    graph.add("PreviewAny", source=graph.classes(labels))
    assert "is too many: classes are below 100000" in refused(server, graph)
