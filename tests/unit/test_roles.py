"""Who learns in each half of an iteration, and how."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unit.tiny import RawMLP, Recorded, config, edm_mlp, labels, recipe

from dmd_train.conditions import Classes
from dmd_train.distil import Distillation
from dmd_train.learner import Learner, StudentEMA
from dmd_train.network import Condition
from dmd_train.pairs import Pairs
from dmd_train.roles import Role, Roles, three_networks

SHAPE = (2, 3, 2)
BATCH = 8


def distillation(**settings: Any) -> Distillation:
    roles = three_networks(edm_mlp(SHAPE))
    return Distillation(roles, recipe(), Classes(3), config(batch_size=BATCH, **settings))


def some_pairs() -> Pairs:
    noise = torch.randn(2, 10, *SHAPE, generator=torch.Generator().manual_seed(7))
    return Pairs(noise[0], noise[1], labels(10))


def weights(role: Role) -> list[Tensor]:
    return [value.detach().clone() for value in role.network.module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Watched:
    """A learner; notes after each update which roles changed and which received gradients."""

    def __init__(self, learner: Learner, roles: Roles, log: list[tuple[set[str], set[str]]]):
        self.learner, self.roles, self.log = learner, roles, log

    def update(self, loss: Tensor, step: int) -> Tensor:
        roles = {name: getattr(self.roles, name) for name in ("teacher", "critic", "student")}
        before = {name: weights(role) for name, role in roles.items()}
        for role in roles.values():
            role.network.module.zero_grad(set_to_none=True)
        norm = self.learner.update(loss, step)
        changed = {name for name, role in roles.items() if not same(before[name], weights(role))}
        gradients = {
            name
            for name, role in roles.items()
            if any(p.grad is not None for p in role.network.module.parameters())
        }
        self.log.append((changed, gradients))
        return norm


def watch(state: Distillation) -> list[tuple[set[str], set[str]]]:
    log: list[tuple[set[str], set[str]]] = []
    state.student = Watched(state.student, state.roles, log)  # type: ignore[assignment]
    state.critic = Watched(state.critic, state.roles, log)  # type: ignore[assignment]
    return log


class Seen:
    """An objective; notes the samples it was given."""

    def __init__(self, objective: Any) -> None:
        self.objective, self.x, self.condition = objective, list[Tensor](), list[Tensor]()

    def __call__(self, x: Tensor, condition: Condition, gen: torch.Generator) -> Tensor:
        self.x.append(x.detach().clone())
        self.condition.append(condition["label"])
        return self.objective(x, condition, gen)


# Roles


def test_critic_and_student_start_as_copies_of_the_teacher_that_share_no_memory() -> None:
    roles = three_networks(edm_mlp(SHAPE))
    assert same(weights(roles.teacher), weights(roles.critic))
    assert same(weights(roles.teacher), weights(roles.student))
    memory = [
        {p.data_ptr() for p in role.network.module.parameters()}
        for role in (roles.teacher, roles.critic, roles.student)
    ]
    assert len(set.union(*memory)) == 3 * len(memory[0])


def test_the_teacher_is_frozen_and_the_copies_train_all_of_their_parameters() -> None:
    roles = three_networks(edm_mlp(SHAPE))
    assert roles.teacher.parameters == {}
    assert not any(p.requires_grad for p in roles.teacher.network.module.parameters())
    for role in (roles.critic, roles.student):
        assert role.parameters == dict(role.network.module.named_parameters())
        assert all(p.requires_grad for p in role.parameters.values())


def test_dropout_is_off_in_all_roles_even_where_the_teacher_came_in_training_mode() -> None:
    teacher = edm_mlp(SHAPE, dropout=0.5)
    teacher.module.train()
    roles = three_networks(teacher)
    state = Distillation(roles, recipe(), Classes(3), config(batch_size=BATCH, critic_updates=1))
    state.iteration(0, None)
    x, t = torch.ones(64, *SHAPE), torch.full((64,), 500)
    for role in (roles.teacher, roles.critic, roles.student):
        once, again = (role.network.predict_x0(x, t, labels(64)) for _ in range(2))
        assert torch.equal(once, again)
        assert not any(module.training for module in role.network.module.modules())
    assert not any(module.training for module in state.averaged_student().module.modules())


# One iteration


@pytest.mark.parametrize("pairs", [None, some_pairs()], ids=["no pairs", "pairs"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_half_step_gives_gradients_to_its_own_role_alone_and_changes_it_alone(
    pairs: Pairs | None, guidance: float
) -> None:
    state = distillation(critic_updates=3, guidance=guidance)
    log = watch(state)
    for step in range(2):
        state.iteration(step, pairs)
    student, critic = ({"student"}, {"student"}), ({"critic"}, {"critic"})
    assert log == [student, critic, critic, critic] * 2


def test_the_first_update_of_a_student_equal_to_its_teacher_has_no_gradient_to_follow() -> None:
    values = distillation().iteration(0, None)
    assert values["student/distribution_matching"] == 0
    assert values["student/gradient_norm"] == 0


@pytest.mark.parametrize("updates", [1, 2, 5])
def test_the_critic_is_updated_as_often_as_it_was_asked_for_each_student_update(
    updates: int,
) -> None:
    state = distillation(critic_updates=updates)
    log = watch(state)
    for step in range(3):
        state.iteration(step, None)
    assert [min(gradients) for _, gradients in log] == (["student"] + ["critic"] * updates) * 3


def test_the_teacher_is_bit_identical_after_many_iterations() -> None:
    state = distillation(guidance=2.0)
    before = weights(state.roles.teacher)
    for step in range(20):
        state.iteration(step, some_pairs())
    assert same(before, weights(state.roles.teacher))
    assert not same(before, weights(state.roles.student))
    assert not same(before, weights(state.roles.critic))


@pytest.mark.parametrize("pairs", [None, some_pairs()], ids=["no pairs", "pairs"])
def test_the_first_critic_update_uses_the_very_samples_of_the_student_update(
    pairs: Pairs | None,
) -> None:
    state = distillation(critic_updates=3)
    student, critic = Seen(state.distribution_matching), Seen(state.denoising)
    state.distribution_matching, state.denoising = student, critic
    state.iteration(0, pairs)
    assert torch.equal(critic.x[0], student.x[0])
    assert torch.equal(critic.condition[0], student.condition[0])
    assert len(student.x[0]) == BATCH  # x_ref gets no distribution matching (DMD algorithm 1)
    assert [len(x) for x in critic.x] == [BATCH] * 3


def test_the_further_critic_updates_use_fresh_samples_of_the_updated_student() -> None:
    state = distillation(critic_updates=3, learning_rate=0.1)
    network = Recorded(state.roles.student.network)
    state.roles = replace(state.roles, student=replace(state.roles.student, network=network))
    state.denoising = critic = Seen(state.denoising)
    state.iteration(0, some_pairs())
    _, second, third = critic.x
    inputs = [call.x_t for call in network.calls[1:]]
    assert not torch.equal(inputs[0], inputs[1])
    for x, z, label in zip((second, third), inputs, critic.condition[1:], strict=True):
        now = network.network.predict_x0(z, torch.full((BATCH,), 999), {"label": label})
        assert torch.equal(x, now)
    assert [call.grad for call in network.calls] == [True, False, False]


def test_the_students_samples_are_the_recipes_one_step_from_scaled_noise() -> None:
    state = distillation()
    network = Recorded(state.roles.student.network)
    state.roles = replace(state.roles, student=replace(state.roles.student, network=network))
    state.iteration(0, None)
    for call in network.calls:
        assert call.t.tolist() == [999] * BATCH
        assert call.x_t.std().item() == pytest.approx(80, rel=0.3)


def test_the_pairs_of_an_update_are_a_batch_of_their_own_size() -> None:
    state = distillation(pair_batch_size=5, critic_updates=1)
    seen: list[tuple[Tensor, Tensor]] = []
    regression = state.regression
    state.regression = lambda x_ref, y_ref: (  # type: ignore[assignment]
        seen.append((x_ref.detach(), y_ref)) or regression(x_ref, y_ref)
    )
    before = state.roles.student.network.copy()
    pairs = some_pairs()
    state.iteration(0, pairs)
    ((x_ref, y_ref),) = seen
    rows = [int((pairs.image == image).flatten(1).all(dim=1).nonzero()) for image in y_ref]
    assert len(rows) == 5
    label = {"label": pairs.condition["label"][rows]}
    expected = before.predict_x0(80 * pairs.noise[rows], torch.full((5,), 999), label)
    torch.testing.assert_close(x_ref, expected.detach())


def test_the_students_loss_is_distribution_matching_plus_weighted_regression() -> None:
    losses: list[float] = []

    class Kept(Watched):
        def update(self, loss: Tensor, step: int) -> Tensor:
            losses.append(loss.item())
            return super().update(loss, step)

    state = distillation(regression_weight=0.25, guidance=2.0, critic_updates=1)
    state.student = Kept(state.student, state.roles, [])  # type: ignore[assignment]
    values = state.iteration(0, some_pairs())
    matching, regression = values["student/distribution_matching"], values["student/regression"]
    assert matching > 0
    assert regression > 0
    assert losses == [pytest.approx((matching + 0.25 * regression).item(), rel=1e-6)]


# How a role learns


def learner(**settings: Any) -> tuple[Learner, Role]:
    role = three_networks(edm_mlp(SHAPE)).student
    return Learner(role, config(**settings)), role


def loss_of(role: Role, scale: float) -> Tensor:
    x = torch.ones(4, *SHAPE)
    return scale * role.network.predict_x0(x, torch.full((4,), 900), labels(4)).square().mean()


def gradient_norm(role: Role) -> float:
    return nn.utils.get_total_norm([p.grad for p in role.parameters.values()]).item()


def test_a_large_gradient_is_cut_to_norm_ten_and_its_true_norm_reported() -> None:
    trained, role = learner()
    small = trained.update(loss_of(role, 1.0), 0).item()
    trained, role = learner()
    true = trained.update(loss_of(role, 1e5), 0).item()
    assert true == pytest.approx(1e5 * small, rel=1e-4)
    assert true > 100
    assert gradient_norm(role) == pytest.approx(10, rel=1e-4)


def test_a_small_gradient_is_left_as_it_is() -> None:
    trained, role = learner()
    norm = trained.update(loss_of(role, 1e-2), 0).item()
    assert norm < 10
    assert gradient_norm(role) == pytest.approx(norm, rel=1e-6)


def test_gradients_of_one_update_do_not_leak_into_the_next() -> None:
    trained, role = learner(learning_rate=1e-9)
    norms = [trained.update(loss_of(role, 1.0), step).item() for step in range(3)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_the_learning_rate_warms_up_linearly_then_stays() -> None:
    trained, _ = learner(learning_rate=2.0, warmup_steps=4, schedule="constant")
    rates = [trained.learning_rate(step) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_without_warm_up_the_first_update_has_the_full_learning_rate() -> None:
    trained, _ = learner(learning_rate=2.0, warmup_steps=0, schedule="constant")
    assert trained.learning_rate(0) == 2.0


def test_a_cosine_ends_near_zero_and_passes_half_at_the_middle() -> None:
    trained, _ = learner(learning_rate=2.0, warmup_steps=0, schedule="cosine", steps=100)
    assert trained.learning_rate(0) == 2.0
    assert trained.learning_rate(25) == pytest.approx(1 + math.cos(math.pi / 4))
    assert trained.learning_rate(50) == pytest.approx(1.0)
    assert 0 < trained.learning_rate(99) < 1e-3


def test_the_optimiser_moves_by_the_learning_rate_of_the_step_it_is_told() -> None:
    """Adam's first update is lr times the gradient's sign."""
    trained, role = learner(learning_rate=1e-3, warmup_steps=10, weight_decay=0)
    before = role.parameters["leave.bias"].detach().clone()
    trained.update(loss_of(role, 1.0), step=4)
    moved = (role.parameters["leave.bias"].detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5e-3), rtol=1e-3, atol=0)


# The moving average


def test_the_average_follows_the_parameters_with_a_decay_that_warms_up() -> None:
    value = nn.Parameter(torch.tensor([0.0]))
    ema, expected = StudentEMA({"value": value}, decay=0.5), 0.0
    for step in range(20):
        value.data.fill_(step + 1.0)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1.0)
        assert ema.average["value"].item() == pytest.approx(expected, rel=1e-6)


def test_a_decay_of_zero_is_the_student_itself() -> None:
    state = distillation(ema_decay=0.0, learning_rate=0.01)
    for step in range(3):
        state.iteration(step, some_pairs())
    averaged = list(state.averaged_student().module.state_dict().values())
    assert same(averaged, weights(state.roles.student))


def test_the_averaged_student_is_the_average_over_all_updates_and_leaves_the_student_alone() -> (
    None
):
    state = distillation(ema_decay=0.9, learning_rate=0.01)
    expected = weights(state.roles.student)
    for step in range(5):
        state.iteration(step, some_pairs())
        decay = min(0.9, (1 + step) / (10 + step))
        now = weights(state.roles.student)
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, now, strict=True)]
    before = weights(state.roles.student)
    averaged = state.averaged_student().module.state_dict().values()
    for one, other in zip(averaged, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert same(before, weights(state.roles.student))
    assert not same(list(averaged), before)


def test_an_update_of_the_average_does_not_touch_the_student() -> None:
    module = RawMLP(SHAPE, classes=3, width=4, layers=2, dropout=0)
    before = [p.detach().clone() for p in module.parameters()]
    ema = StudentEMA(dict(module.named_parameters()), decay=0.9)
    ema.average["leave.bias"].add_(1)
    ema.update(0)
    assert same(before, [p.detach() for p in module.parameters()])
