"""Randomness is a function of (seed, step, purpose): not of history, processes or micro-batches."""

import itertools
from typing import NamedTuple

import pytest
import torch
from kit.tiny import config, edm_mlp, pairs_of, recipe
from torch import Tensor

from dmd_train.data.conditions import Classes
from dmd_train.errors import UserError
from dmd_train.iteration import Distillation
from dmd_train.method.network import Condition
from dmd_train.method.objectives import Denoising
from dmd_train.method.processes import Processes
from dmd_train.method.roles import three_networks
from dmd_train.method.seeding import generator, randn

CPU = torch.device("cpu")
SHAPE = (2, 3, 2)
TWO_STEPS = recipe(timesteps=(999, 499))


def numbers(*stream: int | str) -> Tensor:
    seed, *rest = stream
    return randn((16,), generator(CPU, int(seed), *rest))


def test_the_same_seed_and_stream_draw_the_same_numbers() -> None:
    assert torch.equal(numbers(3, 7, "student"), numbers(3, 7, "student"))


def test_seed_step_and_purpose_each_make_the_draw_another() -> None:
    purposes = ["student", "pairs", "critic 0", "critic 1"]
    streams = list(itertools.product([0, 1, 2**63 - 1], [0, 1, 1000], purposes))
    draws = torch.stack([numbers(*stream) for stream in streams])
    assert draws.unique(dim=0).shape[0] == len(streams)


def test_streams_that_read_alike_when_joined_are_not_confused() -> None:
    alike = [(1, 23, "4"), (12, 3, "4"), (1, 2, "34"), (1, 2, 34), (1, 2, "3", "4"), (1, 2, 3, 4)]
    assert torch.stack([numbers(*stream) for stream in alike]).unique(dim=0).shape[0] == len(alike)


def test_a_stream_is_the_same_in_every_process_and_version() -> None:
    """A number written down here: a changed one would break the resume of older runs."""
    assert generator(CPU, 0, 1, 0, "student").initial_seed() == 6113614447455992802


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = numbers(0, "x")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(numbers(0, "x"), first)


def test_noise_is_standard_normal() -> None:
    x = randn((100_000,), generator(CPU, 0, "x"))
    assert abs(x.mean().item()) < 0.02
    assert abs(x.std().item() - 1) < 0.02


def test_conditions_are_a_pure_function_of_the_generator() -> None:
    one, again, other = (Classes(10).rows(64, generator(CPU, 0, step)) for step in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_random_classes_are_all_classes_and_equally_often() -> None:
    counts = Classes(10).rows(50_000, generator(CPU, 0, "x")).bincount()
    assert len(counts) == 10
    assert (counts - 5000).abs().max() < 350  # five standard deviations


def test_balanced_classes_go_round_robin() -> None:
    assert Classes(3).balanced(8).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_the_label_of_a_row_is_its_class() -> None:
    rows = Classes(10).rows(64, generator(CPU, 0, "x"))
    condition = Classes(10).take(rows, CPU)
    assert list(condition) == ["label"]
    assert torch.equal(condition["label"], rows)


# The same for a whole iteration


class Drawn(NamedTuple):
    """What the critic learns from in one micro-batch. label: (B,)."""

    x: Tensor
    label: Tensor
    t: Tensor
    eps: Tensor


class Kept:
    """An objective that keeps what it was given."""

    def __init__(self, objective: Denoising) -> None:
        self.objective, self.draw, self.all = objective, objective.draw, list[Drawn]()

    def __call__(self, x: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> Tensor:
        self.all.append(Drawn(x.detach().clone(), condition["label"], t, eps))
        return self.objective(x, condition, t, eps)


class OneOf(Processes):
    """One process of several, without the others."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count


def drawn(
    step: int,
    *,
    seed: int = 0,
    process: Processes | None = None,
    micro_batch: int = 0,
    history: int = 0,
) -> list[Drawn]:
    """What the critic learns from at `step`, by a student whose learning rate is almost zero."""
    settings = config(
        seed=seed,
        critic_updates=3,
        learning_rate=1e-30,
        weight_decay=0,
        micro_batch_size=micro_batch,
    )
    state = Distillation(three_networks(edm_mlp(SHAPE)), TWO_STEPS, Classes(3), settings)
    state.processes = process or state.processes
    for before in range(step - history, step):
        state.iteration(before, None)
    state.denoising = kept = Kept(state.denoising)
    state.iteration(step, None)
    return kept.all


def stacked(draws: list[Drawn]) -> Drawn:
    return Drawn(*(torch.stack(column) for column in zip(*draws, strict=True)))


def alike(one: Drawn, other: Drawn) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_an_iteration_draws_does_not_depend_on_the_iterations_before_it() -> None:
    assert alike(stacked(drawn(9)), stacked(drawn(9, history=4)))


def test_every_step_seed_and_critic_update_draws_samples_timesteps_and_noise_of_its_own() -> None:
    runs = stacked([one for run in (drawn(9), drawn(10), drawn(9, seed=1)) for one in run])
    for values in (runs.x, runs.t, runs.eps):
        assert values.flatten(1).unique(dim=0).shape[0] == len(values) == 9
    assert runs.label.unique(dim=0).shape[0] > 5


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_out_exactly_what_one_process_alone_draws(count: int) -> None:
    whole = stacked(drawn(9))
    shares = [stacked(drawn(9, process=OneOf(rank, count))) for rank in range(count)]
    for rank, share in enumerate(shares):
        assert share.x.shape[1] == 8 // count
        mine = Drawn(*(column[:, rank::count] for column in whole))
        torch.testing.assert_close(share.x, mine.x)  # a network on fewer samples rounds otherwise
        assert alike(share._replace(x=mine.x), mine)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_micro_batches_divide_exactly_what_the_whole_batch_draws(size: int) -> None:
    whole, parts = drawn(9), drawn(9, micro_batch=size)
    each = -(-8 // size)
    assert [len(part.t) for part in parts] == [min(size, 8 - i) for i in range(0, 8, size)] * 3
    for i, update in enumerate(whole):
        columns = zip(*parts[i * each : (i + 1) * each], strict=True)
        joined = Drawn(*(torch.cat(column) for column in columns))
        torch.testing.assert_close(joined.x, update.x)
        assert alike(joined._replace(x=update.x), update)


def test_a_batch_that_processes_cannot_share_alike_is_refused_with_the_way_out() -> None:
    assert torch.equal(OneOf(1, 2).part(torch.arange(8)), torch.tensor([1, 3, 5, 7]))
    with pytest.raises(UserError, match="batch of 8 cannot be shared by 3 processes") as caught:
        OneOf(0, 3).part(torch.arange(8))
    assert "batch_size" in str(caught.value)


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    noise = torch.randn(2, 10, *SHAPE, generator=torch.Generator().manual_seed(7))
    pairs = pairs_of(noise[0], noise[1], torch.arange(10) % 3)

    def fresh() -> Distillation:
        settings = config(ema_decay=0.9, warmup_steps=4, schedule="cosine")
        return Distillation(three_networks(edm_mlp(SHAPE)), TWO_STEPS, Classes(3), settings)

    whole = fresh()
    for step in range(6):
        whole.iteration(step, pairs)
        if step == 2:
            saved = {name: value.clone() for name, value in whole.tensors().items()}
    resumed = fresh()
    resumed.restore(saved)
    for step in range(3, 6):
        resumed.iteration(step, pairs)
    for name, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
