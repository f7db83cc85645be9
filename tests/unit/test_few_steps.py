"""A student of several steps: what it is told, and that it learns in the rollout it is sampled by.

That processes, micro-batches and a resume change nothing of it is in test_seeding.py, with sharded
networks in test_fsdp.py, with two adapters in test_adapters.py.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.command_line import Command, WriteRun, refused
from kit.tiny import Exact, Recorded, config, edm_mlp, gaussian, labels, pairs_of, recipe
from torch import Tensor

from dmd_train.config import as_before, dump_config, load_config, make_config
from dmd_train.data.conditions import Classes
from dmd_train.errors import UserError
from dmd_train.iteration import Distillation
from dmd_train.method.noise import EDM, VP, Flow, Noise, per_sample
from dmd_train.method.recipe import RECIPE_KEY, read_recipe
from dmd_train.method.roles import three_networks
from dmd_train.method.sample import sample_student, step_noise
from dmd_train.networks.loaded import Loaded, student_recipe

CPU = torch.device("cpu")
SHAPE = (2, 3, 2)
THREE = (999, 600, 300)
ROWS = 6


def noises(count: int) -> list[Tensor]:
    return step_noise(SHAPE, ROWS, seed=0, nfe=count, device=CPU)


# Sampling


@pytest.mark.parametrize("noise", [VP.scaled_linear(), EDM(), Flow(3.0)], ids=["vp", "edm", "flow"])
def test_a_deterministic_student_goes_on_with_the_noise_that_it_found(noise: Noise) -> None:
    """DDIM with eta = 0, here of a Gaussian's exact denoiser."""
    m, s, z = 0.2, 0.7, noises(3)
    plan = recipe(timesteps=THREE, noise_scale=noise.start_scale, sampler="deterministic")
    x = noise.start_scale * z[0].double()
    for t, after in zip(THREE, (*THREE[1:], None), strict=True):
        alpha, sigma = (float(f(torch.tensor([t]))) for f in (noise.alpha, noise.sigma))
        x0 = (alpha * s**2 * x + sigma**2 * m) / (alpha**2 * s**2 + sigma**2)
        if after is not None:
            eps, at = (x - alpha * x0) / sigma, torch.tensor([after])
            x = float(noise.alpha(at)) * x0 + float(noise.sigma(at)) * eps
    drawn = sample_student(gaussian(m, s, SHAPE, noise), plan, labels(ROWS), z)
    torch.testing.assert_close(drawn.double(), x0, rtol=1e-4, atol=1e-4)


# Training


def watched(sampler: str = "stochastic", **settings: Any) -> tuple[Distillation, Recorded]:
    """A state, and its student, which takes notes."""
    roles = three_networks(edm_mlp(SHAPE))
    student = Recorded(roles.student.network)
    roles = replace(roles, student=replace(roles.student, network=student))
    plan = recipe(timesteps=THREE, sampler=sampler)
    return Distillation(roles, plan, Classes(3), config(**{"batch_size": ROWS} | settings)), student


def rollouts(student: Recorded) -> list[tuple[list[int], list[bool]]]:
    """Timesteps and gradients of the student's calls, a rollout each."""
    found: list[tuple[list[int], list[bool]]] = []
    for call in student.calls:
        if call.t[0] == THREE[0]:
            found.append(([], []))
        found[-1][0].append(int(call.t[0]))
        found[-1][1].append(call.grad)
    return found


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_each_update_learns_at_a_step_drawn_at_random_and_those_before_have_no_gradient(
    sampler: str,
) -> None:
    state, student = watched(sampler, critic_updates=2)
    lengths = set()
    for step in range(12):
        student.calls.clear()
        state.iteration(step, None)
        for (timesteps, gradients), learns in zip(rollouts(student), (True, False), strict=True):
            assert timesteps == list(THREE[: len(timesteps)])
            assert gradients == [False] * (len(timesteps) - 1) + [learns]
        lengths.add(tuple(len(timesteps) for timesteps, _ in rollouts(student)))
    assert {one for one, _ in lengths} == {other for _, other in lengths} == {1, 2, 3}
    assert len(lengths) > 3  # the critic's is another draw


@torch.no_grad()
def test_a_rollout_in_training_is_sampling_cut_off_at_its_step() -> None:
    """Fresh noise of unit size on each x0, and what is matched is the last x0."""
    state, student = watched(critic_updates=1, batch_size=64)
    plain, seen = student.network.copy(), list[Tensor]()
    matching = state.distribution_matching
    gradient = matching.gradient
    matching.gradient = lambda x, *rest: (seen.append(x), gradient(x, *rest))[1]  # type: ignore
    for step in range(20):
        student.calls.clear(), seen.clear()
        with torch.enable_grad():
            state._match(state._draw(matching, step, "student"), step)
        if len(student.calls) == 3:
            break
    fresh = []
    for before, after in pairwise(student.calls):
        x0 = plain.predict_x0(before.x_t, before.t, before.condition)
        fresh.append(((after.x_t - x0) / per_sample(EDM().sigma(after.t))).flatten())
    noise = torch.stack([student.calls[0].x_t.double().flatten() / 80, *fresh])
    torch.testing.assert_close(torch.cov(noise), torch.eye(3).double(), rtol=0, atol=0.15)
    last = student.calls[2]
    assert torch.equal(seen[0], plain.predict_x0(last.x_t, last.t, last.condition))


@pytest.mark.parametrize(("sampler", "steps"), [("stochastic", 1), ("deterministic", 3)])
def test_a_pair_is_of_the_step_whose_x0_its_noise_alone_decides(sampler: str, steps: int) -> None:
    state, student = watched(sampler, regression_warmup_steps=1)
    noise = torch.randn(2, 10, *SHAPE, generator=torch.Generator().manual_seed(7))
    pairs = pairs_of(noise[0], noise[1], torch.arange(10) % 3)
    state.iteration(0, pairs)
    learned = [False] * (steps - 1) + [True]
    assert rollouts(student) == [(list(THREE[:steps]), learned)]


# What it is told


def told(**values: Any) -> dict[str, Any]:
    return {"teacher": "digits", "output": "run"} | values


def test_the_setting_of_before_is_one_timestep_and_the_last_word_counts(tmp_path: Path) -> None:
    assert make_config(told(conditioning_timestep=399), "test").timesteps == (399,)
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text("teacher: digits\noutput: run\nconditioning_timestep: 399\n")
    assert load_config(run_yaml, []).timesteps == (399,)
    assert load_config(run_yaml, ["timesteps=[699, 349]"]).timesteps == (699, 349)
    run_yaml.write_text(dump_config(make_config(told(timesteps=[699, 349]), "test")))
    assert load_config(run_yaml, []).timesteps == (699, 349)
    assert load_config(run_yaml, ["conditioning_timestep=99"]).timesteps == (99,)


def test_a_one_step_run_is_known_by_what_it_was_known_by_before() -> None:
    """By its settings' names and values; a run of the graph has its folder's name from them."""
    before = as_before(make_config(told(preset="sd15-dmd2"), "test"))
    assert before["conditioning_timestep"] == 999
    assert not before.keys() & {"timesteps", "sampler"}
    few = as_before(make_config(told(timesteps=[699, 349], sampler="deterministic"), "test"))
    assert (few["timesteps"], few["sampler"]) == ([699, 349], "deterministic")


@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        ("[249, 999]", "timesteps: write numbers of 999 to 0 that fall, each once"),
        ("[499, 499]", "timesteps: write numbers of 999 to 0 that fall, each once"),
        ("[1000, 499]", "timesteps: write numbers of 999 to 0 that fall, each once"),
        ("[9, 8, 7, 6, 5, 4, 3, 2, 1]", "timesteps: a student has 1 to 8 steps, not 9"),
        ("[]", "timesteps: a student has 1 to 8 steps, not 0"),
        ("[late]", "timesteps.0: input should be a valid integer"),
        ("[true]", "timesteps.0: input should be a valid integer"),
        ("999", "timesteps: input should be a valid tuple"),
        ("[699, 349]", "timesteps: 699: digits networks begin at 999. Put 999 first."),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_in_one_line(
    timesteps: str, words: str, dmd: Command, write_run: WriteRun, tmp_path: Path
) -> None:
    run_yaml = write_run(tmp_path, steps=1)
    refused(dmd("train", run_yaml, "--set", f"timesteps={timesteps}"), words)


@pytest.mark.parametrize("noise", [Flow(3.0), EDM()], ids=["flow", "edm"])
def test_only_networks_with_one_scale_of_noise_begin_below_the_last_timestep(noise: Noise) -> None:
    network = Exact(lambda x, *_: x, SHAPE, noise)
    network.prediction = "flow"
    teacher = Loaded(network, None, "a model", "")
    with pytest.raises(UserError, match=r"begin at 999\. Put 999 first\.$"):
        student_recipe(teacher, config(timesteps=[899, 499]))
    assert student_recipe(teacher, config(timesteps=[999, 499])).timesteps == (999, 499)


def test_the_recipe_of_several_steps_of_a_flow_has_its_shift_and_one_step_needs_none() -> None:
    network = Exact(lambda x, *_: x, SHAPE, Flow(3.0))
    network.prediction = "flow"
    teacher = Loaded(network, None, "a model", "")
    few = student_recipe(teacher, config(timesteps=[999, 499], sampler="deterministic"))
    assert (few.shift, few.sampler) == (3.0, "deterministic")
    assert student_recipe(teacher, config()).shift == 1.0
    assert read_recipe(few.to_metadata("a title", (3, 8, 8)), "file") == few


def test_a_file_of_one_step_says_what_files_of_before_said() -> None:
    """So that packs of before read it too."""
    said = recipe().to_metadata("a title", (3, 8, 8))[RECIPE_KEY]
    assert "sampler" not in said and "shift" not in said
    assert (
        "deterministic" in recipe(sampler="deterministic").to_metadata("a", (3, 8, 8))[RECIPE_KEY]
    )


@pytest.mark.long
def test_students_of_one_and_of_two_steps_are_evaluated_side_by_side(
    dmd: Command, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmd_train.run.metrics.SAMPLES", 500)
    monkeypatch.setattr("dmd_train.run.metrics.HEUN_STEPS", 2)
    monkeypatch.setenv("COLUMNS", "200")
    files = []
    for name, timesteps in (("one", "[999]"), ("two", "[999, 499]")):
        settings = ("--set", f"timesteps={timesteps}", "--set", f"output={tmp_path / name}")
        run_yaml = write_run(tmp_path, steps=2, sample_every=10**6)
        outcome = dmd("train", run_yaml, *settings)
        assert outcome.code == 0, outcome.err
        files.append(tmp_path / name / "student.safetensors")
    said = dmd("evaluate", *files).out
    assert "1. student (1 NFE)" in said and "2. student (2 NFE)" in said
    assert "speed-up" not in said
