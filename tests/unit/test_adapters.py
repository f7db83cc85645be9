"""One frozen network with two adapters: who computes with what, and who receives gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit.tiny import config
from kit.tiny_sd import SHAPE, Texts, tiny_sd
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmd_train.errors import UserError
from dmd_train.iteration import Distillation
from dmd_train.method.adapters import Adapters
from dmd_train.method.lora import kohya_name, merge_lora
from dmd_train.method.network import Network
from dmd_train.method.objectives import Denoising, DistributionMatching
from dmd_train.method.recipe import Recipe
from dmd_train.method.roles import Roles, three_networks, two_adapters
from dmd_train.networks.stable_diffusion import StableDiffusion

CPU = torch.device("cpu")
RECIPE = Recipe(family="sd1", prediction="eps", timesteps=(699, 349), noise_scale=1.0)
NAMES = ("teacher", "critic", "student")


def randomised(roles: Roles) -> Roles:
    """Adapters that do something: as they start, B is zero."""
    gen = torch.Generator().manual_seed(5)
    for role in (roles.critic, roles.student):
        for name, value in role.parameters.items():
            if "lora_B" in name:
                value.data = 0.2 * torch.randn(value.shape, generator=gen)
    return roles


def roles(seed: int = 0) -> Roles:
    return randomised(two_adapters(tiny_sd(), rank=4, alpha=4, seed=seed))


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(batch, *SHAPE, generator=gen)
    return x, torch.full((batch,), 700), Texts().take(torch.arange(batch), CPU)


def predictions(of: Roles) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: getattr(of, name).network.predict_x0(*inputs()) for name in NAMES}


def gradients(of: Roles) -> dict[str, Tensor]:
    return {
        f"{role} {name}": p.grad.clone()
        for role in ("critic", "student")
        for name, p in getattr(of, role).parameters.items()
        if p.grad is not None
    }


def flat(of: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in of.values()])


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_critic_and_student_start_as_the_teacher_exactly() -> None:
    start = predictions(two_adapters(tiny_sd(), rank=4, alpha=4, seed=0))
    assert torch.equal(start["critic"], start["teacher"])
    assert torch.equal(start["student"], start["teacher"])


def test_with_adapters_off_the_network_answers_as_it_did_before_it_had_any() -> None:
    alone = tiny_sd().predict_x0(*inputs())
    assert torch.equal(predictions(roles())["teacher"], alone)


def test_each_role_is_what_the_network_is_in_all_that_a_network_declares() -> None:
    network = tiny_sd()
    network.latent_scale, network.downscale, network.sigma_data = 0.3, 4, 0.7
    network.decoder = nn.Identity()
    of = two_adapters(network, rank=4, alpha=4, seed=0)
    for name in Network.__annotations__:
        for role in (of.teacher, of.critic, of.student):
            assert getattr(role.network, name) is getattr(network, name), name


def test_teacher_critic_and_student_answer_differently_in_any_order_of_asking() -> None:
    of = roles()
    first = predictions(of)
    for name in reversed(NAMES):
        with torch.no_grad():
            again = getattr(of, name).network.predict_x0(*inputs())
        assert torch.equal(again, first[name])
    assert relative(first["critic"], first["teacher"]) > 0.01
    assert relative(first["student"], first["teacher"]) > 0.01
    assert relative(first["student"], first["critic"]) > 0.01


def test_the_starting_adapters_are_a_function_of_the_seed() -> None:
    one, same, other = (roles(seed).student.parameters for seed in (3, 3, 4))
    down = [name for name in one if "lora_A" in name]
    assert all(torch.equal(one[name], same[name]) for name in down)
    assert not any(torch.equal(one[name], other[name]) for name in down)


def test_adapters_are_float32_on_a_network_in_half_precision() -> None:
    network = tiny_sd()
    network.half = True
    of = two_adapters(network, rank=4, alpha=4, seed=0)
    assert {p.dtype for p in of.student.parameters.values()} == {torch.float32}
    base = {v.dtype for k, v in network.module.state_dict().items() if "lora" not in k}
    assert base == {torch.bfloat16}


def test_only_the_adapters_can_be_trained_and_each_layer_of_dmd2s_list_has_one() -> None:
    of = roles()
    module = of.teacher.network.module
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == of.critic.parameters.keys() | of.student.parameters.keys()
    assert not of.critic.parameters.keys() & of.student.parameters.keys()
    layers = {name.partition(".lora_A")[0] for name in of.student.parameters if "lora_A" in name}
    plain = dict(tiny_sd().module.named_modules())
    left_out = {
        name
        for name, layer in plain.items()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name not in layers
    }
    ends = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    assert left_out == set(ends)


@pytest.mark.parametrize("learns", ["student", "critic"])
def test_an_update_gives_gradients_to_the_adapter_that_learns_alone(learns: str) -> None:
    of = roles()
    x, t, condition = inputs()
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    if learns == "student":
        sample = of.student.network.predict_x0(x, t, condition)
        DistributionMatching(of.teacher.network, of.critic.network, 2.0)(
            sample, condition, t, eps
        ).backward()
    else:
        Denoising(of.critic.network)(x, condition, t, eps).backward()
    assert gradients(of).keys() == {f"{learns} {name}" for name in getattr(of, learns).parameters}


def student_gradients(checkpointing: Callable[[Roles], None]) -> dict[str, Tensor]:
    """The distribution matching's, whose own forwards leave another adapter active."""
    of = roles()
    checkpointing(of)
    x, t, condition = inputs()
    sample = of.student.network.predict_x0(x, t, condition)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    loss = DistributionMatching(of.teacher.network, of.critic.network, 2.0)(
        sample, condition, t, eps
    )
    loss.backward()
    return gradients(of)


def agree(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    if one.keys() != other.keys():
        return False
    return all(torch.allclose(one[key], other[key], rtol=1e-4, atol=1e-8) for key in one)


def plain(of: Roles) -> None:
    pass


def checkpointed(of: Roles) -> None:
    of.student.network.checkpoint_gradients()


def checkpointed_by_torch(of: Roles) -> None:
    """What diffusers does by itself: recomputed under whatever adapter is active by then."""

    def by_torch(function: Any, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False)

    of.student.network.checkpoint_gradients(by_torch)


def test_gradients_with_checkpointing_are_those_without() -> None:
    assert agree(student_gradients(plain), student_gradients(checkpointed))


def test_checkpointing_without_our_switch_gives_other_gradients() -> None:
    """What the test above would catch: the backward recomputes with the critic's adapter."""
    assert not agree(student_gradients(plain), student_gradients(checkpointed_by_torch))


def test_checkpointing_does_recompute() -> None:
    of, calls = roles(), list[int]()
    module = of.teacher.network.module
    module.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed(of)
    of.student.network.predict_x0(*inputs()).square().mean().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_give_the_gradients_of_one_large_batch(training: str, micro: int) -> None:
    def received(micro_batch_size: int) -> list[dict[str, Tensor]]:
        settings = {"training": training, "batch_size": 6, "micro_batch_size": micro_batch_size}
        state = distillation(**settings, critic_updates=2, guidance=2.0, learning_rate=1e-6)
        kept: list[dict[str, Tensor]] = []
        for learner in (state.student, state.critic):
            learner.optimizer.register_step_pre_hook(lambda *_: kept.append(gradients(state.roles)))
        state.iteration(0, None)
        return kept

    whole, parts = received(0), received(micro)
    assert len(whole) == len(parts) == 3
    for one, other in zip(parts, whole, strict=True):
        assert one.keys() == other.keys()
        assert relative(flat(one), flat(other)) < 1e-4


def distillation(**settings: Any) -> Distillation:
    made = config(lora_rank=4, **{"learning_rate": 1e-3, **settings})
    network = tiny_sd()
    of = two_adapters(network, 4, 4, 0) if made.training == "lora" else three_networks(network)
    randomised(of)
    return Distillation(of, RECIPE, Texts(), made)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_the_teachers_weights_are_bit_identical_after_iterations_that_moved_the_others(
    training: str,
) -> None:
    state = distillation(training=training, batch_size=2, guidance=2.0, gradient_checkpointing=True)
    before = {k: v.clone() for k, v in tiny_sd().module.state_dict().items()}
    start = {k: v.detach().clone() for k, v in state.roles.student.parameters.items()}
    for step in range(3):
        state.iteration(step, None)
    after = state.roles.teacher.network.module.state_dict()
    base = {k.replace(".base_layer", ""): v for k, v in after.items() if ".lora_" not in k}
    assert base.keys() == before.keys()
    assert all(torch.equal(base[key], before[key]) for key in before)
    moved = [not torch.equal(start[k], v) for k, v in state.roles.student.parameters.items()]
    assert all(moved)


# As a file


def adapters_of(network: StableDiffusion) -> Adapters:
    adapters = Adapters(network, ("student",), rank=4, alpha=2, seed=0)
    for name, value in adapters.parameters("student").items():
        gen = torch.Generator().manual_seed(len(name))
        value.data = 0.3 * torch.randn(value.shape, generator=gen)
    return adapters


def test_merging_a_lora_file_or_the_adapter_gives_what_the_adapter_gives() -> None:
    network = tiny_sd()
    adapters = adapters_of(network)
    with torch.no_grad(), adapters.using("student"):
        expected = network.predict_x0(*inputs())
    from_file, from_adapter = tiny_sd(), tiny_sd()
    merge_lora(from_file.module, adapters.file_tensors("student"), "x")
    from_adapter.module.load_state_dict(adapters.merged("student"))
    with torch.no_grad():
        assert relative(from_file.predict_x0(*inputs()), expected) < 1e-5
        assert relative(from_adapter.predict_x0(*inputs()), expected) < 1e-5
        assert relative(tiny_sd().predict_x0(*inputs()), expected) > 0.01


@pytest.mark.parametrize("prefix", ["", "unet.", "base_model.model."])
def test_a_lora_in_pefts_names_merges_as_one_in_kohyas_without_alpha(prefix: str) -> None:
    adapters = adapters_of(tiny_sd())
    kohya, peft, untouched = tiny_sd(), tiny_sd(), tiny_sd().module.state_dict()
    tensors = adapters.file_tensors("student").items()
    merge_lora(kohya.module, {k: v for k, v in tensors if not k.endswith(".alpha")}, "x")
    own = adapters.parameters("student").items()
    merge_lora(peft.module, {prefix + key: value for key, value in own}, "x")
    for key, value in peft.module.state_dict().items():
        assert torch.equal(value, kohya.module.state_dict()[key])
    changed = [k for k, v in peft.module.state_dict().items() if not v.equal(untouched[k])]
    assert len(changed) == len(adapters.layers)


def test_a_lora_of_another_model_is_refused_by_the_name_of_its_layer() -> None:
    tensors = adapters_of(tiny_sd("sdxl", width=32)).file_tensors("student")
    with pytest.raises(UserError, match=r"^lora\.safetensors: its layer lora_unet_.* does not fit"):
        merge_lora(tiny_sd().module, tensors, "lora.safetensors")


def test_layers_are_named_as_kohya_does() -> None:
    name = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
    expected = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"
    assert kohya_name(name) == expected
