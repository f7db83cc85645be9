"""DMD Distill on the embedded teacher: the headless run's weights, stops, and other doors."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import yaml
from kit.comfy_host import PromptFailed, Server
from kit.distil_graphs import (
    SHORT,
    digits,
    distil,
    headless,
    run_of,
)
from kit.graphs import (
    DIGITS_TEACHER,
    Graph,
    error,
    models,
    sample,
)
from kit.runs import logged_steps, newest, newest_step, same_files


@pytest.fixture(scope="module")
def warm(server: Server) -> Server:
    """A server that has trained: what training imports is in memory for good."""
    graph = Graph()
    digits(graph, steps=2, run="warm")
    server.run(graph)
    return server


def test_a_run_in_the_graph_is_the_headless_run_bit_for_bit(server: Server, tmp_path: Path) -> None:
    graph = Graph()
    digits(graph, steps=60, seed=5, run="both doors")
    server.run(graph)
    run = run_of(server, "both doors")
    headless(run / "run.yaml", tmp_path / "headless")
    assert same_files(run / "student.safetensors", tmp_path / "headless/student.safetensors")
    assert same_files(newest(run), newest(tmp_path / "headless"))


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
    digits(graph, steps=160, seed=8, run="whole")
    warm.run(graph)
    before = memory(warm, 0)

    graph, run = Graph(), run_of(warm, "stopped")
    digits(graph, steps=160, seed=8, run="stopped")
    interrupted(warm, graph, run, at=37)
    step = newest_step(run)
    assert 37 <= step < 160
    assert (run / "student.safetensors").exists()
    assert abs(memory(warm, 1) / before - 1) <= 0.05

    graph = Graph()
    graph.add("DMD_ContinueRun", run="stopped")
    warm.run(graph)
    assert same_files(run / "student.safetensors", run_of(warm, "whole") / "student.safetensors")
    assert same_files(newest(run), newest(run_of(warm, "whole")))


def test_pressing_run_again_goes_on_with_a_stopped_run(warm: Server) -> None:
    graph, run = Graph(), run_of(warm, "again")
    digits(graph, steps=140, seed=8, run="again")
    interrupted(warm, graph, run, at=30)
    step = newest_step(run)
    warm.run(graph)
    steps = logged_steps(run)
    assert step < 140 and steps == list(range(1, 141))


def test_a_run_begun_in_a_terminal_goes_on_in_the_graph(server: Server) -> None:
    run, whole = run_of(server, "from a terminal"), run_of(server, "terminal whole")
    settings = SHORT | {"teacher": "digits", "steps": 60, "seed": 2, "checkpoint_every": 20}
    run_yaml = server.base / "begun.yaml"
    run_yaml.write_text(yaml.safe_dump(settings | {"output": str(run)}))
    run.parent.mkdir(exist_ok=True, parents=True)
    headless(run_yaml, run)
    shutil.copytree(run, whole)
    newest(run).unlink()  # as after a stop between step 40 and 60
    (run / "student.safetensors").unlink()
    assert newest(run).stem == "step-00000040"

    graph = Graph()
    graph.add("DMD_ContinueRun", run="from a terminal")
    server.run(graph)
    assert same_files(run / "student.safetensors", whole / "student.safetensors")


def test_the_student_comes_out_as_a_model_that_a_stock_sampler_runs(server: Server) -> None:
    graph = Graph()
    student = digits(graph, steps=60, run="sampled")
    labels = graph.classes()
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
    labels = graph.classes()
    empty = graph.add("DMD_EmptyLatent", model=loaded, width=0, height=0, batch_size=10)
    (from_file,) = sample(server, graph, graph.ksampler(loaded, labels, empty))
    assert max(error(by_stock, from_file), error(by_ours, from_file)) <= 1e-6


def test_a_run_named_after_its_settings_is_another_one_with_other_pairs(server: Server) -> None:
    folders = []
    for count in (4, 8, 4):
        graph = Graph()
        model = graph.add("DMD_LoadCheckpoint", file=DIGITS_TEACHER)
        labels = graph.classes()
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
