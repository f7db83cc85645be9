"""Randomness and conditions are functions of (seed, step, rank, purpose), never of history."""

import itertools

import torch
from torch import Tensor
from unit.tiny import config, edm_mlp, labels, recipe

from dmd_train.conditions import Classes
from dmd_train.distil import Distillation
from dmd_train.network import Condition
from dmd_train.objectives import Denoising
from dmd_train.pairs import Pairs
from dmd_train.roles import three_networks
from dmd_train.seeding import generator, randn

CPU = torch.device("cpu")
SHAPE = (2, 3, 2)


def drawn(*stream: int | str) -> Tensor:
    seed, *rest = stream
    return randn((16,), generator(CPU, int(seed), *rest))


def test_the_same_seed_and_stream_draw_the_same_numbers() -> None:
    assert torch.equal(drawn(3, 7, 0, "student"), drawn(3, 7, 0, "student"))


def test_seed_step_rank_and_purpose_each_make_the_draw_another() -> None:
    streams = list(itertools.product([0, 1, 2**63 - 1], [0, 1, 1000], [0, 1], ["student", "pairs"]))
    draws = torch.stack([drawn(*stream) for stream in streams])
    assert draws.unique(dim=0).shape[0] == len(streams)


def test_streams_that_read_alike_when_joined_are_not_confused() -> None:
    alike = [(1, 23, "4"), (12, 3, "4"), (1, 2, "34"), (1, 2, 34), (1, 2, "3", "4"), (1, 2, 3, 4)]
    assert torch.stack([drawn(*stream) for stream in alike]).unique(dim=0).shape[0] == len(alike)


def test_a_stream_is_the_same_in_every_process_and_version() -> None:
    """A number written down here: a changed one would break the resume of older runs."""
    assert generator(CPU, 0, 1, 0, "student").initial_seed() == 6113614447455992802


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(0, "x")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(drawn(0, "x"), first)


def test_noise_is_standard_normal() -> None:
    x = randn((100_000,), generator(CPU, 0, "x"))
    assert abs(x.mean().item()) < 0.02
    assert abs(x.std().item() - 1) < 0.02


def test_conditions_are_a_pure_function_of_the_generator() -> None:
    one, again, other = (
        Classes(10).batch(64, generator(CPU, 0, step))["label"] for step in (5, 5, 6)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_random_classes_are_all_classes_and_equally_often() -> None:
    counts = Classes(10).batch(50_000, generator(CPU, 0, "x"))["label"].bincount()
    assert len(counts) == 10
    assert (counts - 5000).abs().max() < 350  # five standard deviations


def test_balanced_classes_go_round_robin() -> None:
    assert Classes(3).balanced(8, CPU)["label"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


# The same for a whole iteration


class Kept:
    """An objective that keeps the samples it was given."""

    def __init__(self, objective: Denoising) -> None:
        self.objective, self.x = objective, list[Tensor]()

    def __call__(self, x: Tensor, condition: Condition, gen: torch.Generator) -> Tensor:
        self.x.append(x.detach().clone())
        return self.objective(x, condition, gen)


def samples(step: int, *, seed: int = 0, rank: int = 0, history: int = 0) -> list[Tensor]:
    """What the critic learns from at `step`, by a student whose learning rate is almost zero."""
    settings = config(seed=seed, critic_updates=3, learning_rate=1e-30, weight_decay=0)
    state = Distillation(three_networks(edm_mlp(SHAPE)), recipe(), Classes(3), settings, rank)
    for before in range(step - history, step):
        state.iteration(before, None)
    state.denoising = kept = Kept(state.denoising)
    state.iteration(step, None)
    return kept.x


def test_what_an_iteration_draws_does_not_depend_on_the_iterations_before_it() -> None:
    assert torch.equal(torch.stack(samples(9)), torch.stack(samples(9, history=4)))


def test_every_step_rank_seed_and_critic_update_draws_samples_of_its_own() -> None:
    runs = [samples(9), samples(10), samples(9, rank=1), samples(9, seed=1)]
    every = torch.stack([x for run in runs for x in run]).flatten(1)
    assert every.unique(dim=0).shape[0] == len(every) == 12


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    noise = torch.randn(2, 10, *SHAPE, generator=torch.Generator().manual_seed(7))
    pairs = Pairs(noise[0], noise[1], labels(10))

    def fresh() -> Distillation:
        settings = config(ema_decay=0.9, warmup_steps=4, schedule="cosine")
        return Distillation(three_networks(edm_mlp(SHAPE)), recipe(), Classes(3), settings)

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
