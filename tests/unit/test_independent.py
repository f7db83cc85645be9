"""The losses' gradients against a second implementation, in float64, straight from the papers.

It shares nothing with the package but the network's own output, the noise and the timesteps.
"""

import pytest
import torch
from kit.tiny_sd import SHAPE, Texts, tiny_sd
from torch import Tensor, nn
from torch.nn import functional

from dmd_train.method.adversarial import Adversarial, Noised, head
from dmd_train.method.noise import Prediction
from dmd_train.method.objectives import Denoising, DistributionMatching
from dmd_train.networks.stable_diffusion import StableDiffusion

CPU = torch.device("cpu")
SAME = 1e-5
BATCH = 4
Text = dict[str, Tensor]
FAMILIES: list[tuple[str, Prediction]] = [("sd1", "eps"), ("sd2", "v"), ("sdxl", "eps")]


def abar() -> Tensor:
    """DMD A.1: sqrt(beta) runs linearly from sqrt(0.00085) to sqrt(0.012)."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, 0)


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def output(network: StableDiffusion, x_t: Tensor, t: Tensor, condition: Text) -> Tensor:
    """The bare UNet of diffusers, by its own signature, in float64."""
    added = None
    if "pooled" in condition:
        height, width = 8 * SHAPE[1], 8 * SHAPE[2]
        ids = torch.tensor([[height, width, 0, 0, height, width]] * len(x_t), dtype=x_t.dtype)
        added = {"text_embeds": condition["pooled"].double(), "time_ids": ids}
    text = condition["text"].double()
    answer: Tensor = network.module(x_t, t, text, added_cond_kwargs=added).sample
    return answer


def mean(network: StableDiffusion, x_t: Tensor, t: Tensor, condition: Text) -> Tensor:
    """D1 equation 11, and v = alpha eps - sigma x0 solved for x0."""
    alpha, sigma = column(abar()[t].sqrt()), column((1 - abar()[t]).sqrt())
    out = output(network, x_t, t, condition)
    if network.prediction == "v":
        return alpha * x_t - sigma * out
    return (x_t - sigma * out) / alpha


def setting(
    family: str, prediction: Prediction
) -> tuple[list[StableDiffusion], dict, list[Tensor]]:
    networks = [tiny_sd(family, prediction, seed) for seed in range(3)]
    for network in networks:
        network.module.double()
        network.empty = {"text": network.empty["text"].double()}
    gen = torch.Generator().manual_seed(4)
    z, eps = torch.randn(2, BATCH, *SHAPE, generator=gen, dtype=torch.float64)
    t = torch.tensor([20, 333, 700, 980])
    condition = Texts(family).take(torch.arange(BATCH), CPU)
    return networks, {key: value.double() for key, value in condition.items()}, [z, eps, t]


def relative(one: list[Tensor], other: list[Tensor]) -> float:
    a, b = (torch.cat([value.flatten() for value in values]) for values in (one, other))
    return float((a - b).norm() / b.norm())


def parameter_gradients(network: StableDiffusion, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.module.parameters())))


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize(("family", "prediction"), FAMILIES)
def test_distribution_matching_is_the_papers_on_every_weight_of_the_student(
    family: str, prediction: Prediction, guidance: float
) -> None:
    (teacher, critic, student), condition, (z, eps, t) = setting(family, prediction)
    last = torch.full((BATCH,), 999)

    x = student.predict_x0(z, last, condition)
    matching = DistributionMatching(teacher, critic, guidance)
    ours = parameter_gradients(student, matching(x, condition, t, eps))

    # DMD algorithm 2, with the guided mean of 3.4: eps = eps_0 + s (eps_c - eps_0)
    x = mean(student, z, last, condition)
    with torch.no_grad():
        x_t = column(abar()[t].sqrt()) * x + column((1 - abar()[t]).sqrt()) * eps
        if family == "sdxl":
            empty = {key: torch.zeros_like(value) for key, value in condition.items()}
        else:
            empty = {"text": teacher.empty["text"].expand(BATCH, -1, -1)}
        conditional, unconditional = (mean(teacher, x_t, t, c) for c in (condition, empty))
        real = unconditional + guidance * (conditional - unconditional)
        fake = mean(critic, x_t, t, condition)
        weight = (x - real).abs().mean(dim=[1, 2, 3], keepdim=True)
        g = (fake - real) / weight
    loss = 0.5 * torch.nn.functional.mse_loss(x, (x - g).detach())
    assert relative(ours, parameter_gradients(student, loss)) <= SAME


@pytest.mark.parametrize(("family", "prediction"), FAMILIES)
def test_the_critics_loss_is_the_plain_error_of_the_networks_own_output(
    family: str, prediction: Prediction
) -> None:
    """D1 algorithm 3: SNR times the error of x0 is the error of eps; with v it is that of v."""
    (_, critic, _), condition, (x, eps, t) = setting(family, prediction)
    ours = parameter_gradients(critic, Denoising(critic)(x, condition, t, eps))

    alpha, sigma = column(abar()[t].sqrt()), column((1 - abar()[t]).sqrt())
    target = eps if prediction == "eps" else alpha * eps - sigma * x
    out = output(critic, alpha * x + sigma * eps, t, condition)
    loss = torch.nn.functional.mse_loss(out, target)
    assert relative(ours, parameter_gradients(critic, loss)) <= SAME


# The adversarial objective of DMD2


def critic_and_head(seed: int = 3) -> tuple[StableDiffusion, nn.Sequential]:
    """In float64, but for the features and the head's arithmetic."""
    return setting("sd1", "eps")[0][1], head(32, 4, 4, seed)


def middle(network: StableDiffusion, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """A UNet of diffusers' as far as its bottleneck, block by block."""
    unet = network.module
    embedding = unet.time_embedding(unet.time_proj(t).double())
    h = unet.conv_in(x_t)
    h, _ = unet.down_blocks[0](h, embedding, encoder_hidden_states=text)
    h, _ = unet.down_blocks[1](h, embedding)
    bottleneck: Tensor = unet.mid_block(h, embedding, encoder_hidden_states=text)
    return bottleneck


def logit(
    network: StableDiffusion, own: nn.Sequential, x: Tensor, t: Tensor, eps: Tensor, text: Tensor
) -> Tensor:
    """DMD2's head on a 4x4 bottleneck: convolution, norm, SiLU, one number."""
    x_t = column(abar()[t].sqrt()) * x + column((1 - abar()[t]).sqrt()) * eps
    first, norm, _, last = own
    double = [(layer.weight.double(), layer.bias.double()) for layer in (first, norm, last)]
    h = functional.conv2d(middle(network, x_t, t, text), *double[0], stride=4)
    h = functional.silu(functional.group_norm(h, norm.num_groups, *double[1]))
    return functional.conv2d(h, *double[2]).flatten()


def drawn(seed: int) -> list[Tensor]:
    x, eps = torch.randn(
        2, BATCH, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    t = torch.randint(1000, (BATCH,), generator=torch.Generator().manual_seed(seed))
    return [x, t, eps]


def test_the_critic_learns_to_tell_real_from_fake_with_head_and_encoder_and_nothing_else() -> None:
    critic, own = critic_and_head()
    (fake, t, eps), (real, t_real, eps_real) = drawn(1), drawn(2)
    texts = Texts().take(torch.arange(6), CPU)["text"].double()
    told, told_real = texts[:4], texts[2:]
    fake.requires_grad_(True)

    loss = Adversarial(critic, own).of_critic(
        Noised(fake, {"text": told}, t, eps), Noised(real, {"text": told_real}, t_real, eps_real)
    )
    parameters = {**dict(critic.module.named_parameters()), **dict(own.named_parameters())}
    ours = torch.autograd.grad(loss, [*parameters.values(), fake], allow_unused=True)
    assert ours[-1] is None
    reached = {name for name, g in zip(parameters, ours, strict=False) if g is not None}
    behind = ("up_blocks", "conv_norm_out", "conv_out")
    assert reached == {name for name in parameters if not name.startswith(behind)}

    # DMD2's code: minus log sigmoid of what is true
    of_fake = logit(critic, own, fake.detach(), t, eps, told)
    of_real = logit(critic, own, real, t_real, eps_real, told_real)
    expected = -(1 - of_fake.sigmoid()).log().mean() - of_real.sigmoid().log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = torch.autograd.grad(expected, [parameters[name] for name in sorted(reached)])
    by_name = dict(zip(parameters, ours, strict=False))
    assert relative([by_name[name] for name in sorted(reached)], list(theirs)) <= 1e-5


def test_the_student_learns_to_look_real_and_its_step_leaves_critic_and_head_alone() -> None:
    critic, own = critic_and_head()
    student = tiny_sd(seed=7)
    student.module.double()
    z, t, eps = drawn(1)
    text = Texts().take(torch.arange(BATCH), CPU)["text"].double()
    last = torch.full((BATCH,), 999)

    x = student.predict_x0(z, last, {"text": text})
    loss = Adversarial(critic, own).of_student(Noised(x, {"text": text}, t, eps))
    ours = parameter_gradients(student, loss)
    loss = Adversarial(critic, own).of_student(
        Noised(student.predict_x0(z, last, {"text": text}), {"text": text}, t, eps)
    )
    loss.backward()
    assert all(p.grad is None for part in (critic.module, own) for p in part.parameters())

    x = student.predict_x0(z, last, {"text": text})
    expected = -logit(critic, own, x, t, eps, text).sigmoid().log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(ours, parameter_gradients(student, expected)) <= 1e-5
