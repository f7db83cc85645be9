"""diffusers' UNet2DModel as an EDM network: preconditioning, classes, and its file."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.tiny import edm_mlp, labels
from torch import Tensor

from dmd_train.errors import UserError
from dmd_train.files.read import read_safetensors
from dmd_train.files.write import write_safetensors
from dmd_train.method.network import NETWORK_KEY
from dmd_train.method.noise import EDM
from dmd_train.networks.edm import EDMNetwork
from dmd_train.networks.edm_unet import edm_unet
from dmd_train.networks.load import load, save

CPU = torch.device("cpu")
CLASSES = 3
SIGMA_DATA = 0.6
TIMESTEPS = torch.tensor([0, 300, 700, 999])


def small_unet(**changes: Any) -> EDMNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = edm_unet(
            CLASSES,
            sigma_data=SIGMA_DATA,
            license="a license",
            **{
                "sample_size": 8,
                "in_channels": 2,
                "out_channels": 2,
                "block_out_channels": (8, 16),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "attention_head_dim": 8,
                **changes,
            },
        )
    network.module.eval()
    return network


def inputs() -> Tensor:
    x0, eps = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return EDM().add(x0, eps, TIMESTEPS)


@torch.no_grad()
def answer(network: EDMNetwork) -> Tensor:
    return network.predict_x0(inputs(), TIMESTEPS, labels(4, CLASSES))


@torch.no_grad()
def test_the_preconditioning_is_edm_table_1_around_the_raw_unet() -> None:
    network, x_t = small_unet(), inputs()
    for i, t in enumerate(TIMESTEPS.tolist()):
        sigma = (0.002 ** (1 / 7) + t / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        root = math.hypot(sigma, SIGMA_DATA)
        label = torch.tensor([i % CLASSES])
        raw = network.module(x_t[[i]] / root, torch.tensor([math.log(sigma) / 4]), label)
        mu = SIGMA_DATA**2 / root**2 * x_t[[i]] + sigma * SIGMA_DATA / root * raw
        torch.testing.assert_close(answer(network)[[i]], mu, rtol=1e-4, atol=1e-5)


def test_the_network_is_told_the_noise_level_and_the_class() -> None:
    network = small_unet()
    x_t = inputs()[:1].expand(4, -1, -1, -1)
    with torch.no_grad():
        by_level = network.module(x_t, torch.linspace(-1.5, 1.1, 4), torch.zeros(4).long())
        by_class = network.module(x_t, torch.zeros(4), torch.arange(4))
    for outputs in (by_level, by_class):
        assert outputs.flatten(1).unique(dim=0).shape[0] == 4


def test_the_null_class_is_one_more_than_the_last_and_has_weights_of_its_own() -> None:
    network = small_unet()
    condition = labels(4, CLASSES)
    null = network.null_condition(condition)
    assert null["label"].tolist() == [CLASSES] * 4
    assert condition["label"].tolist() == [0, 1, 2, 0]
    assert network.module.class_embedding.weight.shape[0] == CLASSES + 1
    with torch.no_grad():
        unconditional = network.predict_x0(inputs(), TIMESTEPS, null)
    assert bool((unconditional - answer(network)).abs().amax(dim=(1, 2, 3)).gt(0).all())


def test_shape_and_license_are_those_of_the_unet() -> None:
    network = small_unet()
    assert network.shape == (2, 8, 8)
    assert network.license == "a license"
    assert network.noise.start_scale == 80


def test_a_saved_unet_loads_with_bit_identical_outputs(tmp_path: Path) -> None:
    network, path = small_unet(), tmp_path / "teacher.safetensors"
    save(path, network)
    loaded = load(str(path), CPU)
    assert torch.equal(answer(loaded.network), answer(network))
    assert loaded.recipe is None
    assert not loaded.network.module.training
    described = ("family", "shape", "classes", "sigma_data", "license")
    for name in described:
        assert getattr(loaded.network, name) == getattr(network, name), name


def test_a_copy_answers_the_same_and_learns_alone() -> None:
    network = small_unet()
    copied = network.copy()
    assert torch.equal(answer(copied), answer(network))
    before = answer(network)
    with torch.no_grad():
        for parameter in copied.module.parameters():
            parameter.add_(0.1)
    assert torch.equal(answer(network), before)
    assert not torch.equal(answer(copied), before)


def test_dropout_of_a_unet_is_off_after_loading(tmp_path: Path) -> None:
    network = small_unet(dropout=0.5)
    network.module.train()
    save(tmp_path / "teacher.safetensors", network)
    loaded = load(str(tmp_path / "teacher.safetensors"), CPU).network
    assert torch.equal(answer(loaded), answer(loaded))


def test_the_embedded_digits_denoise_better_than_no_network_would() -> None:
    """At every noise level, against the best constant and against the noised image itself."""
    from dmd_train.networks.digits import digits

    network, data = load("digits", CPU).network, digits()
    x0, condition = data.image[:500], {"label": data.label[:500]}
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    for t in (200, 400, 600, 800):
        timestep = torch.full((500,), t)
        x_t = network.noise.add(x0, eps, timestep)
        with torch.no_grad():
            error = (network.predict_x0(x_t, timestep, condition) - x0).square().mean()
        no_network = min(x0.var().item(), network.noise.sigma(timestep)[0].item() ** 2)
        assert error < 0.7 * no_network, t


def test_a_family_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "later.safetensors"
    save(path, edm_mlp())
    with pytest.raises(UserError, match="family 'tiny' is not known"):
        load(str(path), CPU)


def test_weights_that_do_not_fit_the_network_are_refused(tmp_path: Path) -> None:
    network, path = small_unet(), tmp_path / "teacher.safetensors"
    save(path, network)
    tensors, metadata = read_safetensors(path)
    assert NETWORK_KEY in metadata
    tensors.pop("conv_in.weight")
    write_safetensors(path, tensors, metadata)
    with pytest.raises(UserError, match="do not fit"):
        load(str(path), CPU)
