"""DMD2's ImageNet-64 layout through diffusers, against ADM written from the papers."""

from pathlib import Path

import pytest
import torch
from kit.adm import adm_denoiser, adm_state
from torch import Tensor

from dmd_train.errors import UserError
from dmd_train.networks.edm import EDMNetwork
from dmd_train.networks.imagenet64 import imagenet64_network
from dmd_train.networks.load import load, save

CLASSES = 7
SIZES = {
    "two levels": {"size": 8, "channels": [128, 256], "blocks": 1, "attention": {4}},
    "three levels, two blocks": {
        "size": 8,
        "channels": [128, 128, 192],
        "blocks": 2,
        "attention": {4, 2},
    },
    "attention everywhere": {"size": 4, "channels": [128, 128], "blocks": 1, "attention": {4, 2}},
}
TIMESTEPS = torch.tensor([0, 250, 500, 750, 999])


def small(seed: int = 0) -> dict[str, Tensor]:
    return adm_state(8, [128, 256], 1, {4}, CLASSES, seed)


def inputs(network: EDMNetwork, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x_t at the noise of TIMESTEPS, and labels, the last of them "no class"."""
    gen = torch.Generator().manual_seed(1)
    eps = torch.randn(len(TIMESTEPS), *network.shape, generator=gen, dtype=dtype)
    std = (network.noise.sigma(TIMESTEPS) ** 2 + 0.25).sqrt().to(dtype)
    return std.view(-1, 1, 1, 1) * eps, torch.tensor([3, 0, 6, 2, CLASSES])


def relative_error(
    network: EDMNetwork, state: dict[str, Tensor], dtype: torch.dtype
) -> tuple[float, float]:
    """Errors of x0, and of what the raw network adds (c_skip x_t hides it at little noise)."""
    x_t, label = inputs(network, dtype)
    sigma = network.noise.sigma(TIMESTEPS).to(dtype)
    onehot = torch.eye(CLASSES + 1, CLASSES, dtype=dtype)[label]
    state = {key: value.to(dtype) for key, value in state.items()}
    network.module.to(dtype)
    with torch.no_grad():
        expected = adm_denoiser(state, x_t, sigma, onehot)
        x0 = network.predict_x0(x_t, TIMESTEPS, {"label": label})
    skipped = (0.25 / (0.25 + sigma**2)).view(-1, 1, 1, 1) * x_t
    wrong = (x0 - expected).flatten(1).norm(dim=1)
    return (
        float((wrong / expected.flatten(1).norm(dim=1)).max()),
        float((wrong / (expected - skipped).flatten(1).norm(dim=1)).max()),
    )


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_network_agrees_with_the_papers_formulas_in_both_precisions(size: dict) -> None:
    state = adm_state(**size, classes=CLASSES)
    network = imagenet64_network(state, "x.bin", "none")
    x0_error, _ = relative_error(network, state, torch.float32)
    assert x0_error < 1e-5
    x0_error, raw_error = relative_error(network, state, torch.float64)
    assert x0_error < 1e-7
    assert raw_error < 1e-6  # diffusers makes the noise embedding in float32


def test_the_true_size_has_edms_parameter_count_and_no_key_is_left_over() -> None:
    with torch.device("meta"):
        state = adm_state(64, [192, 384, 576, 768], 3, {32, 16, 8}, 1000)
    network = imagenet64_network(state, "x.bin", "none")
    count = sum(p.numel() for p in network.module.parameters())
    assert (network.shape, network.classes) == ((3, 64, 64), 1000)
    assert round(count / 1e6) == 296  # as EDM reports


def test_a_half_precision_file_becomes_float32() -> None:
    state = {key: value.half() for key, value in small().items()}
    network = imagenet64_network(state, "x.bin", "none")
    assert {p.dtype for p in network.module.parameters()} == {torch.float32}


def test_every_parameter_can_be_trained_and_is_contiguous() -> None:
    network = imagenet64_network(small(), "x.bin", "none")
    network.predict_x0(
        torch.randn(2, 3, 8, 8), torch.tensor([999, 400]), {"label": torch.tensor([0, CLASSES])}
    ).square().mean().backward()
    for name, parameter in network.module.named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.grad is not None, name


def test_the_loaded_network_can_be_saved_and_loaded_as_our_own(tmp_path: Path) -> None:
    network = imagenet64_network(small(), "x.bin", "CC")
    save(tmp_path / "a.safetensors", network)
    again = load(str(tmp_path / "a.safetensors"), torch.device("cpu")).network
    x_t, label = inputs(network, torch.float32)
    condition = {"label": label}
    with torch.no_grad():
        assert again.predict_x0(x_t, TIMESTEPS, condition).equal(
            network.predict_x0(x_t, TIMESTEPS, condition)
        )
    assert again.license == "CC"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("model.dec.8x8_up.conv1.bias"), "no 'model.dec.8x8_up.conv1.bias'"),
        (lambda s: s.update({"model.map_augment.weight": torch.zeros(1)}), "model.map_augment"),
        (
            lambda s: s.update(
                {"model.enc.4x4_down.conv0.resample_filter": torch.tensor([[[[1.0, 3, 3, 1]]]])}
            ),
            "another filter",
        ),
        (lambda s: s.update({"model.out_norm.weight": torch.ones(64)}), "size mismatch"),
    ],
    ids=["a missing weight", "a weight too many", "another filter", "a wrong shape"],
)
def test_a_file_that_differs_is_refused_in_one_line(change, said: str) -> None:
    state = small()
    change(state)
    with pytest.raises(UserError) as caught:
        imagenet64_network(state, "some.bin", "none")
    message = str(caught.value)
    assert message.startswith("some.bin: ") and said in message and "\n" not in message


def test_fewer_than_128_channels_are_refused_because_their_groups_would_differ() -> None:
    with pytest.raises(UserError, match="64 channels"):
        imagenet64_network(adm_state(8, [64, 128], 1, set(), CLASSES), "some.bin", "none")
