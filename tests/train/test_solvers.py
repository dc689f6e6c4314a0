"""The solvers on Gaussian data, where every error is known exactly: orders of convergence and marginal variances."""

from __future__ import annotations

from itertools import pairwise
from math import log, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from python_train.sample import SOLVERS, sample
from python_train.solvers import Churn, noise_levels

STD, SIGMA_MAX, SIGMA_MIN = 0.5, 80, 0.002
# The solution at sigma_min, and the Euler step from there to 0 that every solver ends with.
LIMIT = STD**2 / sqrt(STD**2 + SIGMA_MIN**2)


def gaussian_denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    """The exact denoiser of zero-mean Gaussian data with standard deviation STD."""
    return x * STD**2 / (STD**2 + sigma**2)


def sampled_std(solver: str, num_steps: int, **settings: float) -> float:
    """The standard deviation of the samples, exactly: the denoiser is linear, so a sample is a combination of the
    standard normal variables drawn, and each of them is represented by a unit vector."""
    draws = iter(torch.eye(num_steps + 1, dtype=torch.float64))
    noise = next(draws) * sqrt(STD**2 + SIGMA_MAX**2) / SIGMA_MAX  # its marginal at sigma_max, not only the noise's
    out = sample(
        gaussian_denoiser,
        noise,
        solver=solver,
        num_steps=num_steps,
        dtype=torch.float64,
        randn_like=lambda x: next(draws),
        **settings,
    )
    return out.norm().item()


@pytest.mark.parametrize(
    ("solver", "settings", "order"),
    [
        ("euler", {}, 1),
        ("heun", {}, 2),
        ("dpm++2m", {}, 2),
        ("dpm++2m-sde", {}, 2),
        ("euler", {"S_churn": 30, "S_min": 0.05, "S_max": 50}, 1),
        ("heun", {"S_churn": 30, "S_min": 0.05, "S_max": 50}, 2),
    ],
)
def test_order_of_convergence(solver: str, settings: dict[str, float], order: int) -> None:
    steps = [128, 256, 512, 1024]
    errors = [abs(sampled_std(solver, num_steps, **settings) - LIMIT) for num_steps in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    # Measured: 1.00, 2.01, 2.02, 2.02, 0.94, 1.97; with churn the noise of a step is cut off below 72 steps.
    assert -slope == pytest.approx(order, abs=0.12)
    assert all(later < earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("settings", [{"solver": "dpm++2m-sde"}, {"solver": "heun", "S_churn": 40, "S_noise": 1.0}])
def test_stochastic_solvers_keep_the_variance_and_forget_the_noise(settings: dict) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20_000, generator=generator)
    out = sample(
        gaussian_denoiser,
        noise,
        num_steps=256,
        randn_like=lambda x: torch.randn(x.shape, generator=generator),
        **settings,
    )
    assert out.std().item() == pytest.approx(STD, abs=0.01)  # its standard error is 0.0025
    assert abs(torch.corrcoef(torch.stack([out, noise]))[0, 1]) < 0.2


def test_dpmpp_2m_by_hand() -> None:
    """Two steps written out from Lu et al. 2022, Algorithm 2, in their variables, then the step to 0."""
    levels = noise_levels(3, dtype=torch.float64).tolist()
    t0, t1, t2, _ = levels
    h1, h2 = log(t0 / t1), log(t1 / t2)
    r = h1 / h2
    x = torch.tensor([1.5], dtype=torch.float64) * t0
    D0 = gaussian_denoiser(x, torch.tensor(t0))
    x = t1 / t0 * x - (np.exp(-h1) - 1) * D0
    D1 = gaussian_denoiser(x, torch.tensor(t1))
    x = t2 / t1 * x - (np.exp(-h2) - 1) * ((1 + 1 / (2 * r)) * D1 - D0 / (2 * r))
    expected = gaussian_denoiser(x, torch.tensor(t2))
    out = sample(gaussian_denoiser, torch.tensor([1.5]), solver="dpm++2m", num_steps=3, dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("solver", "evaluations", "draws"), [("heun", 19, 0), ("euler", 10, 0), ("dpm++2m", 10, 0), ("dpm++2m-sde", 10, 9)]
)
def test_evaluations_and_draws(solver: str, evaluations: int, draws: int) -> None:
    calls = {"net": 0, "noise": 0}

    def net(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        calls["net"] += 1
        assert x.dtype == sigma.dtype == torch.float64
        assert sigma.ndim == 0
        return gaussian_denoiser(x, sigma).float()

    def randn_like(x: Tensor) -> Tensor:
        calls["noise"] += 1
        assert x.dtype == torch.float64
        return torch.randn_like(x)

    out = sample(net, torch.ones(2, 3), solver=solver, num_steps=10, dtype=torch.float64, randn_like=randn_like)
    assert out.shape == (2, 3)
    assert out.dtype == torch.float64
    assert calls == {"net": evaluations, "noise": draws}


def test_single_precision_is_enough() -> None:
    def draw(solver: str, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(0)

        def randn_like(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=generator).to(x.dtype)

        return sample(gaussian_denoiser, torch.ones(64), solver=solver, dtype=dtype, randn_like=randn_like)

    for solver in SOLVERS:
        single, double = draw(solver, torch.float32), draw(solver, torch.float64)
        # Measured: 2.3e-7 to 5.4e-7.
        assert (single.double() - double).norm() <= 2e-6 * double.norm(), solver


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver": "dpm"}, "solver must be one of heun, euler, dpm\\+\\+2m, dpm\\+\\+2m-sde, got 'dpm'"),
        ({"solver": "dpm++2m", "S_churn": 1}, "S_churn is for heun and euler, not for dpm"),
        ({"solver": "euler", "S_churn": float("inf")}, "S_churn must not be negative or infinite"),
        ({"S_churn": 1, "S_noise": float("nan")}, "S_noise must not be negative or infinite, got nan"),
        ({"S_churn": 1, "S_min": 2, "S_max": 1}, "expected 0 <= S_min <= S_max, got 2 and 1"),
        ({"S_churn": 1, "S_max": float("nan")}, "expected 0 <= S_min <= S_max, got 0 and nan"),
    ],
)
def test_bad_settings_are_named(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample(gaussian_denoiser, torch.ones(1), **settings)


def test_churn_range_is_inclusive() -> None:
    levels = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0])
    assert Churn(1, 1, 2).gammas(levels) == [0, 0.25, 0.25, 0]
    assert Churn(9, 1, 2).gammas(levels) == [0, sqrt(2) - 1, sqrt(2) - 1, 0]
    assert Churn(0, 1, 2).gammas(levels) == [0] * 4
