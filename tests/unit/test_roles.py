"""Who learns in each half of an iteration, and how."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from kit.tiny import RawMLP, Recorded, config, edm_mlp, labels, pairs_of, recipe
from torch import Tensor, nn

from dmd_train.data.conditions import Classes
from dmd_train.data.pairs import Pairs
from dmd_train.iteration import Distillation
from dmd_train.learner import Learner, StudentEMA
from dmd_train.method.network import Condition
from dmd_train.method.processes import Processes
from dmd_train.method.roles import Role, three_networks

CPU = torch.device("cpu")
SHAPE = (2, 3, 2)
BATCH = 8


def distillation(**settings: Any) -> Distillation:
    roles = three_networks(edm_mlp(SHAPE))
    return Distillation(roles, recipe(), Classes(3), config(batch_size=BATCH, **settings))


def some_pairs() -> Pairs:
    noise = torch.randn(2, 10, *SHAPE, generator=torch.Generator().manual_seed(7))
    return pairs_of(noise[0], noise[1], torch.arange(10) % 3)


def weights(role: Role) -> list[Tensor]:
    return [value.detach().clone() for value in role.network.module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def watch(state: Distillation) -> list[tuple[set[str], set[str]]]:
    """Roles by update: those that changed since the one before, and those with gradients."""
    roles = {name: getattr(state.roles, name) for name in ("teacher", "critic", "student")}
    last = {name: weights(role) for name, role in roles.items()}
    log: list[tuple[set[str], set[str]]] = []

    def note(*_: object) -> None:
        now = {name: weights(role) for name, role in roles.items()}
        changed = {name for name in roles if not same(last[name], now[name])}
        gradients = {
            name
            for name, role in roles.items()
            if any(p.grad is not None for p in role.network.module.parameters())
        }
        last.update(now)
        log.append((changed, gradients))

    for learner in (state.student, state.critic):
        learner.optimizer.register_step_post_hook(note)
    return log


class Seen:
    """An objective; notes what it was given."""

    def __init__(self, objective: Any) -> None:
        self.objective, self.draw = objective, objective.draw
        self.x, self.condition = list[Tensor](), list[Tensor]()
        self.drawn = list[tuple[Tensor, Tensor]]()

    def __call__(self, x: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> Tensor:
        self.x.append(x.detach().clone())
        self.condition.append(condition["label"])
        self.drawn.append((t, eps))
        return self.objective(x, condition, t, eps)


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
    with state.ema.swapped_in():
        assert not any(module.training for module in roles.student.network.module.modules())


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
    inputs = [call.x_t for call in network.calls[2:]]
    assert not torch.equal(inputs[0], inputs[1])
    for x, z, label in zip((second, third), inputs, critic.condition[1:], strict=True):
        now = network.network.predict_x0(z, torch.full((BATCH,), 999), {"label": label})
        assert torch.equal(x, now)
    assert [call.grad for call in network.calls] == [True, True, False, False]


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
    distance = state.distance
    state.distance = lambda x_ref, y_ref: (
        seen.append((x_ref.detach(), y_ref)) or distance(x_ref, y_ref)
    )
    before = state.roles.student.network.copy()
    pairs = some_pairs()
    state.iteration(0, pairs)
    ((x_ref, y_ref),) = seen
    whole = pairs.take(torch.arange(len(pairs)), CPU)
    rows = [int((whole.image == image).flatten(1).all(dim=1).nonzero()) for image in y_ref]
    assert len(rows) == 5
    label = {"label": labels(10)["label"][rows]}
    expected = before.predict_x0(80 * whole.noise[rows], torch.full((5,), 999), label)
    torch.testing.assert_close(x_ref, expected.detach())


def test_in_the_warm_up_the_regression_has_its_whole_weight_whatever_it_has_later() -> None:
    norms = []
    for weight in (0.0, 0.25, 1.0):
        state = distillation(regression_weight=weight, regression_warmup_steps=1)
        norms.append(state.iteration(0, some_pairs())["student/gradient_norm"])
    assert norms[0] > 0 and norms[0] == norms[1] == norms[2]


def test_the_student_follows_distribution_matching_plus_the_weighted_regression() -> None:
    state = distillation(regression_weight=0.25, guidance=2.0, critic_updates=1, clip_norm=1e9)
    network = Recorded(state.roles.student.network)
    state.roles = replace(state.roles, student=replace(state.roles.student, network=network))
    state.distribution_matching = matching = Seen(state.distribution_matching)
    parameters, pairs = list(state.student.parameters.values()), some_pairs()
    losses: list[float] = []

    def check(*_: object) -> None:
        """The losses once more as one sum, before anything is updated."""
        x, x_ref = (network.network.predict_x0(c.x_t, c.t, c.condition) for c in network.calls)
        whole = pairs.take(torch.arange(len(pairs)), CPU)
        scaled = 80 * whole.noise
        rows = [int((scaled == z).flatten(1).all(dim=1).nonzero()) for z in network.calls[1].x_t]
        loss = matching.objective(x, network.calls[0].condition, *matching.drawn[0])
        loss = loss + 0.25 * (x_ref - whole.image[rows]).square().mean()
        losses.append(loss.item())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
            assert gradient.abs().max() > 1e-5

    state.student.optimizer.register_step_pre_hook(check)
    values = state.iteration(0, pairs)
    matched, regression = values["student/distribution_matching"], values["student/regression"]
    assert matched > 0
    assert regression > 0
    assert losses == [pytest.approx((matched + 0.25 * regression).item(), rel=1e-6)]


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_change_neither_the_gradients_nor_the_values_reported(size: int) -> None:
    def run(micro_batch: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        state = distillation(micro_batch_size=micro_batch, guidance=2.0, critic_updates=2)
        gradients: list[Tensor] = []
        for learner in (state.student, state.critic):
            parameters = list(learner.parameters.values())
            learner.optimizer.register_step_pre_hook(
                lambda *_, parameters=parameters: gradients.extend(
                    p.grad.clone() for p in parameters
                )
            )
        return gradients, state.iteration(0, some_pairs())

    (whole, values), (parts, same_values) = run(0), run(size)
    assert len(whole) == 3 * 7
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6 * float(one.abs().max()) + 1e-9)
    assert values.keys() == same_values.keys()
    for name, value in values.items():
        torch.testing.assert_close(same_values[name], value, rtol=1e-4, atol=0, msg=name)


# How a role learns


def learner(**settings: Any) -> tuple[Learner, Role]:
    role = three_networks(edm_mlp(SHAPE)).student
    return Learner(role, config(**settings), Processes(CPU)), role


def loss_of(role: Role, scale: float) -> Tensor:
    x = torch.ones(4, *SHAPE)
    return scale * role.network.predict_x0(x, torch.full((4,), 900), labels(4)).square().mean()


def update(trained: Learner, loss: Tensor, step: int = 0) -> tuple[float, float]:
    """The gradient's norm that an update on `loss` reports, and the one that it follows."""
    followed: list[Tensor] = []

    def note(*_: object) -> None:
        gradients = [p.grad.flatten() for p in trained.parameters.values() if p.grad is not None]
        followed.append(torch.cat(gradients).norm())

    hook = trained.optimizer.register_step_pre_hook(note)
    loss.backward()
    reported = trained.update(step)
    hook.remove()
    (norm,) = followed
    return reported.item(), norm.item()


def test_a_large_gradient_is_cut_to_norm_ten_and_its_true_norm_reported() -> None:
    trained, role = learner()
    small, _ = update(trained, loss_of(role, 1.0))
    trained, role = learner()
    true, followed = update(trained, loss_of(role, 1e5))
    assert true == pytest.approx(1e5 * small, rel=1e-4)
    assert true > 100
    assert followed == pytest.approx(10, rel=1e-4)


def test_a_small_gradient_is_left_as_it_is() -> None:
    trained, role = learner()
    norm, followed = update(trained, loss_of(role, 1e-2))
    assert norm < 10
    assert followed == pytest.approx(norm, rel=1e-6)


def test_gradients_of_one_update_do_not_leak_into_the_next() -> None:
    trained, role = learner(learning_rate=1e-9)
    norms = []
    for step in range(3):
        norms.append(update(trained, loss_of(role, 1.0), step)[0])
        assert all(p.grad is None for p in role.parameters.values())
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_gradients_until_an_update_add_up() -> None:
    trained, role = learner()
    once, _ = update(trained, loss_of(role, 3.0))
    trained, role = learner()
    for _ in range(2):
        loss_of(role, 1.0).backward()
    assert update(trained, loss_of(role, 1.0))[0] == pytest.approx(once, rel=1e-5)


def test_the_learning_rate_warms_up_linearly_then_stays() -> None:
    trained, _ = learner(learning_rate=2.0, warmup_steps=4, schedule="constant")
    rates = [trained.config.rate(step) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_without_warm_up_the_first_update_has_the_full_learning_rate() -> None:
    trained, _ = learner(learning_rate=2.0, warmup_steps=0, schedule="constant")
    assert trained.config.rate(0) == 2.0


def test_a_cosine_ends_near_zero_and_passes_half_at_the_middle() -> None:
    trained, _ = learner(learning_rate=2.0, warmup_steps=0, schedule="cosine", steps=100)
    assert trained.config.rate(0) == 2.0
    assert trained.config.rate(25) == pytest.approx(1 + math.cos(math.pi / 4))
    assert trained.config.rate(50) == pytest.approx(1.0)
    assert 0 < trained.config.rate(99) < 1e-3


def test_the_optimiser_moves_by_the_learning_rate_of_the_step_it_is_told() -> None:
    """Adam's first update is lr times the gradient's sign."""
    trained, role = learner(learning_rate=1e-3, warmup_steps=10, weight_decay=0)
    before = role.parameters["leave.bias"].detach().clone()
    update(trained, loss_of(role, 1.0), step=4)
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
    student = weights(state.roles.student)
    with state.ema.swapped_in():
        assert same(weights(state.roles.student), student)
    assert same(weights(state.roles.student), student)


def test_the_average_is_over_all_updates_and_is_the_student_while_it_is_swapped_in() -> None:
    state = distillation(ema_decay=0.9, learning_rate=0.01)
    expected = weights(state.roles.student)
    for step in range(5):
        state.iteration(step, some_pairs())
        decay = min(0.9, (1 + step) / (10 + step))
        now = weights(state.roles.student)
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, now, strict=True)]
    before = weights(state.roles.student)
    with state.ema.swapped_in():
        averaged = weights(state.roles.student)
    for one, other in zip(averaged, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert same(before, weights(state.roles.student))
    assert not same(averaged, before)


def test_swapping_the_average_in_and_out_changes_nothing_that_is_kept_or_learned() -> None:
    """Not even where what is done inside fails."""
    state, undisturbed = distillation(ema_decay=0.9), distillation(ema_decay=0.9)
    for step in range(4):
        for one in (state, undisturbed):
            one.iteration(step, some_pairs())
        moments = [value.clone() for value in state.student.tensors().values()]
        with pytest.raises(ZeroDivisionError), state.ema.swapped_in():
            inside = [v for k, v in state.student.tensors().items() if "@" in k]
            outside = [v for k, v in undisturbed.student.tensors().items() if "@" in k]
            assert inside
            assert same(inside, outside)
            _ = 1 / 0
        assert same(moments, list(state.student.tensors().values()))
    assert state.tensors().keys() == undisturbed.tensors().keys()
    assert same(list(state.tensors().values()), list(undisturbed.tensors().values()))


def test_an_update_of_the_average_does_not_touch_the_student() -> None:
    module = RawMLP(SHAPE, classes=3, width=4, layers=2, dropout=0)
    before = [p.detach().clone() for p in module.parameters()]
    ema = StudentEMA(dict(module.named_parameters()), decay=0.9)
    ema.average["leave.bias"].add_(1)
    ema.update(0)
    assert same(before, [p.detach() for p in module.parameters()])
