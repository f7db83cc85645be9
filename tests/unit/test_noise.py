"""The forward process and the conversions to x0, against formulas written out here."""

import math

import pytest
import torch
from torch import Tensor

from dmd_train.method.noise import (
    EDM,
    VP,
    Flow,
    Noise,
    Prediction,
    denoising_weight,
    edm_scalings,
    per_sample,
    x0_from,
)

SD = VP.scaled_linear()
ALL_T = torch.arange(1000)
FAMILIES = pytest.mark.parametrize(
    "noise", [SD, EDM(), Flow(), Flow(shift=3)], ids=["vp", "edm", "flow", "flow-shift-3"]
)
NATURAL = pytest.mark.parametrize(
    ("noise", "prediction"),
    [(SD, "eps"), (SD, "v"), (EDM(), "eps"), (EDM(), "edm"), (Flow(), "flow"), (Flow(3), "flow")],
    ids=["vp-eps", "vp-v", "edm-eps", "edm-edm", "flow-flow", "flow-shift-3"],
)
"""Each family with the predictions that exist for it."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_stable_diffusions_cumulative_products_are_the_published_ones() -> None:
    published = {999: 0.004660, 749: 0.056623, 499: 0.277670, 399: 0.426086, 249: 0.675432}
    for t, value in published.items():
        assert SD.alphas_cumprod[t].item() == pytest.approx(value, abs=5e-7)
        assert SD.alpha(torch.tensor([t])).square().item() == pytest.approx(value, abs=5e-7)


def test_stable_diffusion_samples_from_unit_noise_though_t_999_is_not_pure_noise() -> None:
    assert SD.alpha(torch.tensor([SD.last])).item() == pytest.approx(0.0683, abs=1e-4)
    assert SD.start_scale == 1.0


def test_alpha_and_sigma_squared_sum_to_one_for_vp_and_plainly_for_flow() -> None:
    torch.testing.assert_close(
        SD.alpha(ALL_T) ** 2 + SD.sigma(ALL_T) ** 2, torch.ones(1000).double()
    )
    for flow in (Flow(), Flow(shift=3)):
        torch.testing.assert_close(flow.alpha(ALL_T) + flow.sigma(ALL_T), torch.ones(1000).double())


def test_edm_sigmas_are_karras_flipped_so_that_index_zero_is_the_smallest() -> None:
    r = torch.arange(1000, dtype=torch.float64) / 999
    karras = (80 ** (1 / 7) + r * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(EDM().sigma(ALL_T), karras.flip(0), rtol=1e-12, atol=0)
    low, middle, high = EDM().sigma(torch.tensor([20, 500, 980])).tolist()
    assert EDM().sigma(torch.tensor([0])).item() == pytest.approx(0.002, rel=1e-12)
    assert EDM().sigma(torch.tensor([999])).item() == pytest.approx(80, rel=1e-12)
    assert (low, middle, high) == pytest.approx((0.00323, 2.53, 72.05), rel=2e-3)
    assert torch.equal(EDM().alpha(ALL_T), torch.ones(1000).double())


def test_a_fractional_edm_timestep_lies_between_its_neighbours_in_the_seventh_root() -> None:
    below, between, above = EDM().sigma(torch.tensor([499.0, 499.5, 500.0])).pow(1 / 7).tolist()
    assert between == pytest.approx((below + above) / 2, rel=1e-12)
    eighteen = torch.linspace(999, 0, 18, dtype=torch.float64)
    r = torch.arange(18, dtype=torch.float64) / 17
    karras = (80 ** (1 / 7) + r * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(EDM().sigma(eighteen), karras, rtol=1e-12, atol=0)


def test_a_shift_of_the_flow_follows_the_published_formula_and_ends_in_pure_noise() -> None:
    r = (ALL_T.double() + 1) / 1000
    torch.testing.assert_close(Flow().sigma(ALL_T), r)
    torch.testing.assert_close(Flow(shift=3).sigma(ALL_T), 3 * r / (1 + 2 * r))
    assert Flow(shift=3).sigma(torch.tensor([999])).item() == 1.0


@FAMILIES
def test_noise_grows_with_the_timestep(noise: Noise) -> None:
    ratio = noise.sigma(ALL_T) / noise.alpha(ALL_T)
    assert bool((ratio.diff() > 0).all())


@FAMILIES
def test_add_is_alpha_x0_plus_sigma_eps_rounded_once(noise: Noise) -> None:
    t = torch.tensor([0, 20, 500, 980, 999])
    x0, eps = normal(5, 2, 3, 4).float(), normal(5, 2, 3, 4, seed=1).float()
    x_t = noise.add(x0, eps, t)
    assert x_t.dtype == torch.float32
    for i in range(len(t)):
        alpha, sigma = noise.alpha(t)[i].item(), noise.sigma(t)[i].item()
        assert torch.equal(x_t[i], (alpha * x0[i].double() + sigma * eps[i].double()).float())


def test_each_sample_of_a_batch_gets_its_own_timestep() -> None:
    x0, eps = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1)
    t = torch.tensor([10, 500, 990])
    together = EDM().add(x0, eps, t)
    for i in range(3):
        assert torch.equal(
            together[i : i + 1], EDM().add(x0[i : i + 1], eps[i : i + 1], t[i : i + 1])
        )


@NATURAL
@pytest.mark.parametrize("t", [0, 20, 500, 980, 998])
def test_every_prediction_gives_the_posterior_mean_of_gaussian_data(
    noise: Noise, prediction: Prediction, t: int
) -> None:
    """x0 ~ N(m, s^2): what the best network would answer, in its own terms, must come out as
    E[x0 | x_t] = (alpha s^2 x_t + sigma^2 m) / (alpha^2 s^2 + sigma^2)."""
    m, s, sigma_data = 0.3, 0.8, 0.7
    alpha, sigma = noise.alpha(torch.tensor([t])), noise.sigma(torch.tensor([t]))
    a, b = alpha.item(), sigma.item()
    x_t = a * (m + s * normal(1, 3, 4, 4)) + b * normal(1, 3, 4, 4, seed=1)
    variance = a**2 * s**2 + b**2
    mean = (a * s**2 * x_t + b**2 * m) / variance
    mean_eps = b * (x_t - a * m) / variance
    output = {
        "eps": mean_eps,
        "v": a * mean_eps - b * mean,
        "flow": mean_eps - mean,
        "edm": (mean - sigma_data**2 / (b**2 + sigma_data**2) * x_t)
        * math.sqrt(b**2 + sigma_data**2)
        / (b * sigma_data),
    }[prediction]
    x0 = x0_from(prediction, output, x_t, alpha, sigma, sigma_data)
    torch.testing.assert_close(x0, mean, rtol=1e-9, atol=1e-9)


def test_flow_gives_x0_even_where_nothing_is_left_of_it() -> None:
    x0, eps = normal(1, 1, 2, 2), normal(1, 1, 2, 2, seed=1)
    last = torch.tensor([999])
    alpha, sigma = Flow().alpha(last), Flow().sigma(last)
    assert alpha.item() == 0
    torch.testing.assert_close(x0_from("flow", eps - x0, eps, alpha, sigma), x0)


def test_the_eps_conversion_at_999_is_rounded_once_where_float32_errs_many_times_more() -> None:
    last = torch.tensor([999])
    alpha, sigma = SD.alpha(last), SD.sigma(last)
    assert 1 / alpha.item() == pytest.approx(14.65, abs=0.005)
    x0, eps = normal(1, 4, 64, 64).float(), normal(1, 4, 64, 64, seed=1).float()
    x_t = SD.add(x0, eps, last)
    exact = (x_t.double() - sigma.item() * eps.double()) / alpha.item()
    converted = x0_from("eps", eps, x_t, alpha, sigma)
    in_float32 = (x_t - sigma.float().item() * eps) / alpha.float().item()
    assert converted.dtype == torch.float32
    assert torch.equal(converted, exact.float())
    error = (converted - exact).square().mean().sqrt()
    assert (in_float32 - exact).square().mean().sqrt() > 10 * error  # measured: 30 times


def test_edm_scalings_are_those_of_table_1() -> None:
    for sigma in (0.002, 0.5, 3.0, 80.0):
        c = edm_scalings(torch.tensor([sigma], dtype=torch.float64), 0.75)
        root = math.sqrt(sigma**2 + 0.75**2)
        assert [part.item() for part in c] == pytest.approx(
            [0.75**2 / root**2, sigma * 0.75 / root, 1 / root, math.log(sigma) / 4], rel=1e-12
        )
    at_80 = edm_scalings(torch.tensor([80.0], dtype=torch.float64), 0.5)
    assert at_80.c_skip.item() == pytest.approx(3.9e-5, rel=2e-3)
    assert at_80.c_out.item() == pytest.approx(0.49999, rel=2e-6)


@NATURAL
@pytest.mark.parametrize("t", [0, 300, 998])
def test_the_denoising_weight_makes_the_x0_error_the_plain_error_on_the_networks_output(
    noise: Noise, prediction: Prediction, t: int
) -> None:
    """SNR |mu - x0|^2 = |eps_hat - eps|^2 (VP); (sigma^-2 + sigma_d^-2) is weight 1 on EDM's F."""
    sigma_data = 0.7
    step = torch.tensor([t])
    alpha, sigma = noise.alpha(step), noise.sigma(step)
    a, b = alpha.item(), sigma.item()
    x0, eps = normal(1, 2, 3, 3), normal(1, 2, 3, 3, seed=1)
    x_t = a * x0 + b * eps
    root = math.sqrt(b**2 + sigma_data**2)
    target = {
        "eps": eps,
        "v": a * eps - b * x0,
        "flow": eps - x0,
        "edm": (x0 - sigma_data**2 / root**2 * x_t) * root / (b * sigma_data),
    }[prediction]
    guess = target + normal(1, 2, 3, 3, seed=2)
    mu = x0_from(prediction, guess, x_t, alpha, sigma, sigma_data)
    weight = per_sample(denoising_weight(prediction, alpha, sigma, sigma_data))
    torch.testing.assert_close(weight * (mu - x0) ** 2, (guess - target) ** 2, rtol=1e-7, atol=1e-9)


def test_the_denoising_weight_is_the_one_algorithm_3_prints() -> None:
    t = torch.tensor([0, 500, 999])
    snr = SD.alphas_cumprod[t] / (1 - SD.alphas_cumprod[t])
    torch.testing.assert_close(denoising_weight("eps", SD.alpha(t), SD.sigma(t)), snr)
    torch.testing.assert_close(denoising_weight("v", SD.alpha(t), SD.sigma(t)), snr + 1)
    sigma = EDM().sigma(t)
    torch.testing.assert_close(denoising_weight("edm", EDM().alpha(t), sigma), sigma**-2 + 4)
