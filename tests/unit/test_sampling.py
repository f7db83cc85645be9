"""The student by its recipe, the teacher by Heun, and the pairs for the regression."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from kit.tiny import Recorded, config, edm_mlp, gaussian, labels, recipe
from torch import Tensor

from dmd_train.config import Config
from dmd_train.data.conditions import Classes
from dmd_train.data.pairs import Pairs, StoredPairs, make_pairs, origin_of, teacher_sample
from dmd_train.errors import UserError
from dmd_train.files.shards import Shards
from dmd_train.method.noise import EDM, VP, Flow, Noise
from dmd_train.method.sample import draw, sample_heun, sample_student, step_noise

CPU = torch.device("cpu")
SHAPE = (2, 3, 4)
FOUR = (999, 749, 499, 249)


def noises(count: int, batch: int = 6) -> list[Tensor]:
    return step_noise(SHAPE, batch, seed=0, nfe=count, device=CPU)


@pytest.mark.parametrize("timesteps", [(999,), (999, 499), FOUR])
def test_a_student_is_evaluated_once_at_each_timestep_of_its_recipe(
    timesteps: tuple[int, ...],
) -> None:
    student = Recorded(edm_mlp(SHAPE))
    plan = recipe(timesteps=timesteps)
    sample_student(student, plan, labels(6), noises(plan.nfe))
    assert len(student.calls) == plan.nfe == len(timesteps)
    assert [call.t.tolist() for call in student.calls] == [[t] * 6 for t in timesteps]
    assert all(torch.equal(c.condition["label"], labels(6)["label"]) for c in student.calls)


@pytest.mark.parametrize("noise_scale", [1.0, 80.0])
def test_the_first_input_is_pure_noise_times_the_recipes_scale(noise_scale: float) -> None:
    student, noise = Recorded(edm_mlp(SHAPE)), noises(4)
    sample_student(student, recipe(timesteps=FOUR, noise_scale=noise_scale), labels(6), noise)
    assert torch.equal(student.calls[0].x_t, noise_scale * noise[0])


@pytest.mark.parametrize("noise", [EDM(), VP.scaled_linear(), Flow()], ids=["edm", "vp", "flow"])
def test_every_further_input_is_the_last_x0_with_fresh_noise_on_it(noise: Noise) -> None:
    student, eps = Recorded(gaussian(0.2, 0.7, SHAPE, noise)), noises(4)
    x0 = sample_student(student, recipe(timesteps=FOUR, noise_scale=1.0), labels(6), eps)
    for (before, after), fresh in zip(pairwise(student.calls), eps[1:], strict=True):
        answer = student.network.predict_x0(before.x_t, before.t, before.condition)
        alpha = noise.alpha(after.t).view(-1, 1, 1, 1)
        sigma = noise.sigma(after.t).view(-1, 1, 1, 1)
        assert torch.equal(after.x_t, (alpha * answer + sigma * fresh).float())
    last = student.calls[-1]
    assert torch.equal(x0, student.network.predict_x0(last.x_t, last.t, last.condition))


def test_the_noise_of_each_step_is_another() -> None:
    flat = torch.stack(noises(4)).flatten(1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.3
    assert flat.std().item() == pytest.approx(1, abs=0.1)


def test_too_few_or_too_many_noises_for_the_recipe_are_an_error() -> None:
    for count in (3, 5):
        with pytest.raises(ValueError, match="noises for 4 steps"):
            sample_student(edm_mlp(SHAPE), recipe(timesteps=FOUR), labels(6), noises(count))


def test_one_step_lets_the_gradient_through_to_the_student() -> None:
    student = edm_mlp(SHAPE)
    sample_student(student, recipe(), labels(6), noises(1)).sum().backward()
    assert all(p.grad is not None for p in student.module.parameters())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (4, 64, 64)])
def test_image_i_is_the_same_picture_in_a_batch_of_any_size(shape: tuple[int, int, int]) -> None:
    """Rows of 16 values or a multiple: torch fills in blocks, and the last block differently."""
    large, small, one = (step_noise(shape, count, 0, 2, CPU) for count in (7, 3, 1))
    for step in range(2):
        assert torch.equal(large[step][:3], small[step])
        assert torch.equal(small[step][:1], one[step])
        assert large[step].flatten(1).unique(dim=0).shape[0] == 7
    assert torch.equal(noises(1)[0], noises(4)[0])


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_the_first_noise_is_what_comfyui_draws_for_this_seed(seed: int) -> None:
    """What comfy.sample.prepare_noise gives."""
    with torch.random.fork_rng():
        gen = torch.manual_seed(seed)
        latent = torch.randn([3, 4, 8, 8], dtype=torch.float32, generator=gen, device="cpu")
    assert torch.equal(step_noise((4, 8, 8), 3, seed, 4, CPU)[0], latent)


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_heun_takes_twice_its_steps_less_one_evaluations_from_the_largest_sigma_down(
    steps: int,
) -> None:
    teacher, z = Recorded(edm_mlp(SHAPE)), noises(1)[0]
    sample_heun(teacher, z, labels(6), steps)
    assert len(teacher.calls) == 2 * steps - 1
    assert torch.equal(teacher.calls[0].x_t, 80 * z)
    sigmas = [EDM().sigma(call.t)[0].item() for call in teacher.calls]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] == pytest.approx(80)
    assert sigmas[-1] == pytest.approx(0.002 if steps > 1 else 80)


def test_guided_heun_makes_one_evaluation_of_both_halves_each_time() -> None:
    teacher = Recorded(edm_mlp(SHAPE))
    sample_heun(teacher, noises(1)[0], labels(6), steps=4, guidance=2.0)
    assert [len(call.x_t) for call in teacher.calls] == [12] * 7


def test_heun_follows_the_exact_ode_of_gaussian_data_with_second_order() -> None:
    """x0 ~ N(m, s^2) has the solution m + (z sigma_max - m) s / sqrt(s^2 + sigma_max^2).

    Measured: 0.087 at 18 steps, 0.0192 at 36, 0.00452 at 72, 0.00109 at 144.
    """
    m, s = 0.3, 0.5
    z = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = m + (80 * z - m) * s / math.hypot(s, 80)

    def error(steps: int) -> float:
        return (sample_heun(gaussian(m, s), z, labels(64), steps) - exact).abs().max().item()

    assert error(18) < 0.1
    assert error(36) / error(72) == pytest.approx(4, rel=0.25)
    assert error(72) / error(144) == pytest.approx(4, rel=0.25)


def test_heun_agrees_with_algorithm_1_of_edm_written_out() -> None:
    teacher, z, steps = edm_mlp(SHAPE), noises(1)[0].double(), 5
    teacher.module.double()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        root = math.hypot(sigma, 0.5)
        c_noise = torch.full((6,), math.log(sigma) / 4, dtype=torch.float64)
        raw = teacher.module(x / root, c_noise, labels(6)["label"])
        return 0.25 / root**2 * x + sigma * 0.5 / root * raw

    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = [(high + i / (steps - 1) * (low - high)) ** 7 for i in range(steps)] + [0.0]
    x = sigma[0] * z
    for now, after in pairwise(sigma):
        slope = (x - denoise(x, now)) / now
        euler = x + (after - now) * slope
        if after:
            slope_after = (euler - denoise(euler, after)) / after
            euler = x + (after - now) * (slope + slope_after) / 2
        x = euler
    torch.testing.assert_close(sample_heun(teacher, z, labels(6), steps), x, rtol=1e-9, atol=1e-9)


def test_a_teacher_is_drawn_by_heun_and_a_student_by_its_recipe() -> None:
    network, noise = edm_mlp(SHAPE), noises(1)
    one_step = network.predict_x0(80 * noise[0], torch.full((6,), 999), labels(6))
    assert torch.equal(draw(network, recipe(), noise, labels(6)), one_step)
    heun = sample_heun(network, noise[0], labels(6), steps=18)
    assert torch.equal(draw(network, None, noise, labels(6)), heun)


def made_in(folder: Path, settings: Config, made_from: str = "tiny") -> Iterator[int]:
    return make_pairs(
        folder,
        settings.pairs,
        settings.seed,
        SHAPE,
        Classes(3),
        settings.pair_batch_size,
        origin_of(made_from, settings),
        teacher_sample(edm_mlp(SHAPE), Classes(3), settings),
    )


def pairs_folder(folder: Path, name: str, seed: int = 0, guidance: float = 1.0) -> Path:
    settings = config(pairs=20, pair_steps=4, seed=seed, guidance=guidance)
    path = folder / name
    assert list(made_in(path, settings))[-1] == 20
    return path


def whole(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, noise and images of all pairs."""
    batch = pairs.take(torch.arange(len(pairs)), CPU)
    return batch.row, batch.noise, batch.image


def test_pairs_of_one_seed_are_the_same_files_and_of_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (
        {file.name: file.read_bytes() for file in pairs_folder(tmp_path, name, seed).iterdir()}
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_image_of_a_pair_is_deterministic_heun_from_its_own_noise_in_half_precision(
    tmp_path: Path, guidance: float
) -> None:
    row, noise, image = whole(
        StoredPairs(Shards(pairs_folder(tmp_path, "pairs", guidance=guidance)))
    )
    assert noise.shape == image.shape == (20, *SHAPE)
    assert noise.dtype == image.dtype == torch.float32
    assert noise.flatten(1).unique(dim=0).shape[0] == 20
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert row.unique().tolist() == [0, 1, 2]
    for z, label, y in zip(noise.split(5), row.split(5), image.split(5), strict=True):
        exact = sample_heun(edm_mlp(SHAPE), z, {"label": label}, 4, guidance)
        assert torch.equal(y, exact.half().float())


def test_a_batch_of_pairs_keeps_noise_image_and_condition_together(tmp_path: Path) -> None:
    pairs = StoredPairs(Shards(pairs_folder(tmp_path, "pairs")))
    numbers = pairs.draw(50, torch.Generator().manual_seed(0))
    batch = pairs.take(numbers, CPU)
    condition = Classes(3).take(batch.row, CPU)
    exact = sample_heun(edm_mlp(SHAPE), batch.noise, condition, 4)
    # rtol: half a unit in the last place of float16
    torch.testing.assert_close(batch.image, exact, rtol=2**-11, atol=1e-5)
    assert batch.noise.flatten(1).unique(dim=0).shape[0] > 10


def test_a_pair_is_the_same_whatever_it_is_made_together_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 4 in batches of 3, and one of 20 in batches of 5; the first 9 and all 20."""
    row, noise, image = whole(StoredPairs(Shards(pairs_folder(tmp_path, "pairs"))))
    monkeypatch.setattr("dmd_train.data.pairs.BYTES", 1)
    settings = config(pairs=9, pair_steps=4, pair_batch_size=3)
    path = tmp_path / "few"
    list(made_in(path, settings))
    assert len(list(path.iterdir())) == 3
    few_rows, few_noise, few_image = whole(StoredPairs(Shards(path)))
    assert torch.equal(few_rows, row[:9])
    assert torch.equal(few_noise, noise[:9])
    torch.testing.assert_close(few_image, image[:9], rtol=2**-10, atol=1e-5)


def test_pairs_are_made_by_any_sampler_that_is_told_the_rows_and_the_first_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 4, the last of 2, and batches of 3."""
    monkeypatch.setattr("dmd_train.data.pairs.BYTES", 1)
    batches = []

    def halved(noise: Tensor, rows: Tensor, first: int) -> Tensor:
        batches.append((first, len(noise), len(rows)))
        return noise / 2 + rows.view(-1, 1, 1, 1)

    made = make_pairs(tmp_path, 10, 0, SHAPE, Classes(3), 3, "halved", halved)
    assert list(made) == [4, 8, 10]
    assert batches == [(0, 3, 3), (3, 1, 1), (4, 3, 3), (7, 1, 1), (8, 2, 2)]
    row, noise, image = whole(StoredPairs(Shards(tmp_path)))
    torch.testing.assert_close(image, noise / 2 + row.view(-1, 1, 1, 1), rtol=2**-10, atol=1e-5)


def test_pairs_by_another_teacher_or_another_sampling_are_not_mixed_in(tmp_path: Path) -> None:
    path = pairs_folder(tmp_path, "pairs")
    for origin, steps in (("other teacher", 4), ("tiny", 5)):
        settings = config(pairs=20, pair_steps=steps)
        with pytest.raises(UserError, match="made by another teacher"):
            list(made_in(path, settings, origin))
