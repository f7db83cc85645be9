"""The adversarial objective: its head, whom it teaches, and that runs with it are runs.

Its formulas are held in test_independent.py.
"""

from typing import Any

import pytest
import torch
from kit.runs import apart
from kit.tiny import InMemory, config, edm_mlp, recipe
from kit.tiny_sd import SHAPE, Texts, tiny_sd
from torch import Tensor, nn

from dmd_train.data.conditions import Classes, Conditions
from dmd_train.data.images import Images
from dmd_train.errors import UserError
from dmd_train.iteration import Distillation
from dmd_train.method.adversarial import Adversarial, head
from dmd_train.method.network import Network
from dmd_train.method.processes import Processes
from dmd_train.method.roles import two_adapters
from dmd_train.prepare import make_roles

CPU = torch.device("cpu")
MLP = (2, 3, 2)
BATCH = 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(shape: tuple[int, int, int], conditions: Conditions | None = None) -> Images:
    """Ten of them, of the conditions 0, 1, 2, 0, ...; None: nothing is known of them."""
    x0 = noise(10, *shape, seed=5)
    row = torch.arange(10) % 3 if conditions else None
    return Images(InMemory(x0=x0, is_used=torch.ones(10, dtype=torch.bool)), row, conditions)


def distillation(known: bool = True, **settings: Any) -> Distillation:
    """Of a small MLP, with images."""
    asked = config(batch_size=BATCH, adversarial_weight=0.1, **settings)
    roles = make_roles(edm_mlp(MLP), asked)
    real = images(MLP, Classes(3) if known else None)
    return Distillation(roles, recipe(), Classes(3), asked, images=real)


def test_the_head_halves_down_to_a_side_of_four_and_then_takes_all_of_it() -> None:
    def kernels(height: int, width: int) -> list[tuple[int, ...]]:
        layers = head(64, height, width, 0)
        assert layers(noise(2, 64, height, width)).shape == (2, 1, 1, 1)
        return [layer.kernel_size for layer in layers if isinstance(layer, nn.Conv2d)]

    assert kernels(32, 32) == [(4, 4)] * 4 + [(1, 1)]  # SDXL at 1024 pixels
    assert kernels(8, 8) == [(4, 4)] * 2 + [(1, 1)]  # SD 1.5 at 512, EDM
    assert kernels(12, 24) == [(4, 4), (6, 12), (1, 1)]
    assert kernels(1, 1) == [(1, 1)] * 2


def test_a_head_can_tell_two_inputs_apart_even_with_few_channels() -> None:
    layers, h = head(4, 1, 1, 0), noise(2, 4, 1, 1)
    one, other = layers(h).flatten().tolist()
    assert abs(one - other) > 1e-3


def test_a_head_is_a_function_of_the_seed() -> None:
    one, same, other = (head(8, 4, 4, seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# Whom it teaches, and what is told of the images


def test_the_discriminator_sees_the_timesteps_that_are_set() -> None:
    asked = distillation(adversarial_t_min=250, adversarial_t_max=252).adversarial
    assert asked
    t, _ = asked.draw(torch.Size((64, *MLP)), torch.Generator().manual_seed(0))
    assert set(t.tolist()) == {250, 251, 252}
    everywhere = distillation().adversarial
    assert everywhere and (everywhere.t_min, everywhere.t_max) == (0, 999)


def test_the_head_learns_in_the_critics_updates_alone() -> None:
    state = distillation(critic_updates=1)
    heads = {k: v for k, v in state.roles.critic.parameters.items() if k.startswith("head.")}
    assert len(heads) == 6
    before = {name: value.detach().clone() for name, value in heads.items()}
    at_the_students_step: list[bool] = []
    state.student.optimizer.register_step_post_hook(
        lambda *_: at_the_students_step.extend(
            p.grad is None and torch.equal(before[name], p) for name, p in heads.items()
        )
    )
    values = state.iteration(0, None)
    assert at_the_students_step == [True] * 6
    assert not any(torch.equal(before[name], p) for name, p in heads.items())
    assert {"student/adversarial", "critic/adversarial"} <= values.keys()


def test_where_nothing_is_known_of_the_images_the_discriminator_is_told_nothing_of_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[list[int]] = []
    plain = Adversarial.logit
    monkeypatch.setattr(
        Adversarial,
        "logit",
        lambda self, x: [told.append(x.condition["label"].tolist()), plain(self, x)][1],
    )
    distillation(known=False, critic_updates=1).iteration(0, None)
    assert told == [[3] * 4, [3] * 8]
    told.clear()
    distillation(known=True, critic_updates=1).iteration(0, None)
    assert all(0 <= label < 3 for labels in told for label in labels)


def test_a_network_without_a_known_middle_is_refused_in_one_line() -> None:
    bare = edm_mlp(MLP)
    bare.middle = ""
    real = images(MLP, Classes(3))
    with pytest.raises(UserError, match="images: tiny networks have no middle"):
        Distillation(make_roles(bare, config()), recipe(), Classes(3), config(), images=real)


# Runs


def test_a_run_goes_on_bit_for_bit_with_its_head() -> None:
    whole = distillation()
    for step in range(3):
        whole.iteration(step, None)
    begun = distillation()
    for step in range(2):
        begun.iteration(step, None)
    kept = {name: value.clone() for name, value in begun.tensors().items()}
    resumed = distillation()
    resumed.restore(kept)
    resumed.iteration(2, None)
    one, other = whole.tensors(), resumed.tensors()
    assert any(name.startswith("critic/head.") and "@" in name for name in one)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("how", [{"micro_batch_size": 1}, {"gradient_checkpointing": True}])
def test_memory_savers_change_nothing_of_two_adapters_with_images(how: dict[str, Any]) -> None:
    def trained(**settings: Any) -> dict[str, Tensor]:
        asked = config(
            training="lora", lora_rank=2, batch_size=2, critic_updates=1, lora_alpha=2,
            adversarial_weight=1.0, critic_adversarial_weight=1.0, ema_decay=0.0, **settings,
        )  # fmt: skip
        network: Network = tiny_sd()
        roles = two_adapters(network, 2, 2, seed=0)
        texts: Any = Texts()
        real = images(SHAPE, texts)
        own = recipe(prediction="eps", noise_scale=1.0)
        state = Distillation(roles, own, texts, asked, images=real)
        for step in range(2):
            state.iteration(step, None)
        return state.tensors()

    plain, saving = trained(), trained(**how)
    for part in ("student", "critic/head", "critic"):
        assert apart(saving, plain, part) <= 1e-4


def test_a_spread_network_is_computed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP counts on it; the features are the same."""
    network = edm_mlp(MLP)
    ended: list[bool] = []
    network.module.register_forward_hook(lambda *_: ended.append(True))
    arguments = noise(2, *MLP), torch.tensor([0, 999]), {"label": torch.tensor([0, 1])}
    early = network.features(*arguments)
    assert ended == []
    monkeypatch.setattr("dmd_train.method.network.is_spread", lambda _: True)
    assert torch.equal(network.features(*arguments), early)
    assert ended == [True]
    assert Processes(CPU).count == 1
