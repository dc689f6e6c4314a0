"""Solvers of the reverse diffusion on a fixed grid of noise levels: Heun and Euler with churn, DPM-Solver++(2M).

Time is the noise level itself: sigma(t) = t, s(t) = 1. Every solver takes ``denoise(x, t, step)``, where ``step`` is
the number of the step that asks, and noise levels t_0 > ... > t_{N-1} > t_N = 0; x enters at t_0 and leaves at t_N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf, sqrt
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from edm2ext import ops

RandnLike = Callable[[Tensor], Tensor]


class Denoised(NamedTuple):
    """What the networks say of an image, as `ops.sampler_step` takes it: D = guide + guidance * (denoised - guide)."""

    denoised: Tensor
    guide: Tensor | None = None
    guidance: float = 1.0

    def blended(self) -> Tensor:
        """D itself."""
        return self.denoised if self.guide is None else self.guide.lerp(self.denoised, self.guidance)


class Denoise(Protocol):
    """What a solver calls; ``network`` is how it takes the input ``x_in`` that a step of the sampler can make of x."""

    network: ops.NetworkInput | None

    def __call__(self, x: Tensor, t: Tensor, step: int, x_in: Tensor | None = None) -> Denoised: ...


def noise_levels(
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise levels t_0 = sigma_max > ... > t_{N-1} = sigma_min, t_N = 0 of the sampler (spec 6.1; EDM Eq. 5).

    Returns a tensor [num_steps + 1] of the given dtype. Raises ValueError for fewer than 2 steps or limits that are
    not 0 < sigma_min < sigma_max, rho > 0.
    """
    if num_steps < 2:
        raise ValueError(f"noise_levels: num_steps must be at least 2, got {num_steps}")
    if not 0 < sigma_min < sigma_max < inf:
        raise ValueError(f"noise_levels: expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if not 0 < rho < inf:
        raise ValueError(f"noise_levels: rho must be positive, got {rho}")
    ramp = torch.arange(num_steps, dtype=dtype, device=device) / (num_steps - 1)
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (start + ramp * (end - start)) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


@dataclass(frozen=True)
class Churn:
    """Noise added back at the start of each step within a range of noise levels (EDM Algorithm 2, lines 4 to 6)."""

    S_churn: float = 0  # amount over all steps; 0 = none
    S_min: float = 0
    S_max: float = inf
    S_noise: float = 1  # inflation of what is added

    def __post_init__(self) -> None:
        if not 0 <= self.S_churn < inf:
            raise ValueError(f"S_churn must not be negative or infinite, got {self.S_churn}")
        if not 0 <= self.S_min <= self.S_max:
            raise ValueError(f"churn: expected 0 <= S_min <= S_max, got {self.S_min} and {self.S_max}")
        if not 0 <= self.S_noise < inf:
            raise ValueError(f"S_noise must not be negative or infinite, got {self.S_noise}")

    def gammas(self, levels: Tensor) -> list[float]:
        """By how much each step of the grid raises its noise level: t_hat = (1 + gamma) t."""
        num_steps = len(levels) - 1
        if self.S_churn == 0:
            return [0.0] * num_steps
        gamma = min(self.S_churn / num_steps, sqrt(2) - 1)
        churned = (levels[:-1] >= self.S_min) & (levels[:-1] <= self.S_max)
        return [gamma if within else 0.0 for within in churned.tolist()]


NO_CHURN = Churn()


def heun(
    denoise: Denoise, x: Tensor, levels: Tensor, churn: Churn = NO_CHURN, randn_like: RandnLike = torch.randn_like
) -> Tensor:
    """Heun's 2nd-order method (spec 6.1; EDM Algorithm 2): 2N - 1 evaluations; the step to 0 is an Euler step.

    Without churn it solves the probability-flow ODE. ``randn_like`` is called once per churned step.
    """
    return _edm(denoise, x, levels, churn, randn_like, correct=True)


def euler(
    denoise: Denoise, x: Tensor, levels: Tensor, churn: Churn = NO_CHURN, randn_like: RandnLike = torch.randn_like
) -> Tensor:
    """Euler's 1st-order method, `heun` without the correction: N evaluations."""
    return _edm(denoise, x, levels, churn, randn_like, correct=False)


def _edm(denoise: Denoise, x: Tensor, levels: Tensor, churn: Churn, randn_like: RandnLike, correct: bool) -> Tensor:
    """Each pass of `ops.sampler_step` ends with the noise that the next step begins with, and the network's input."""
    gammas = churn.gammas(levels)
    if gammas[0]:
        t_hat = levels[0] * (1 + gammas[0])
        x = x + (t_hat**2 - levels[0] ** 2).sqrt() * churn.S_noise * randn_like(x)
    x_in = None
    for i, (t, t_next) in enumerate(pairwise(levels[:-1])):
        t_hat = t * (1 + gammas[i])
        step = partial(ops.sampler_step, t_hat=t_hat, t_next=t_next, network=denoise.network)
        start, evaluated = x, denoise(x, t_hat, i, x_in)
        if correct:
            x, x_in = step(start, **evaluated._asdict())
            evaluated = denoise(x, t_next, i, x_in)
        added = {"noise": randn_like(x), "churn": gammas[i + 1], "S_noise": churn.S_noise} if gammas[i + 1] else {}
        x, x_in = step(x, **evaluated._asdict(), start=start if correct else None, **added)
    t_hat = levels[-2] * (1 + gammas[-1])
    evaluated = denoise(x, t_hat, len(gammas) - 1, x_in)
    return ops.sampler_step(x, **evaluated._asdict(), t_hat=t_hat, t_next=levels[-1])[0]


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Tensor) -> Tensor:
    """DPM-Solver++(2M) on the probability-flow ODE (Lu et al. 2022, Algorithm 2): 2nd order, N evaluations.

    Each step extrapolates from the previous one's denoised image, so a guidance weight that jumps between two steps
    costs accuracy there. The step to 0 returns the denoised image.
    """
    return _dpmpp_2m(denoise, x, levels, 0, torch.randn_like)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, levels: Tensor, randn_like: RandnLike = torch.randn_like) -> Tensor:
    """SDE-DPM-Solver++(2M) on the reverse-time SDE (Lu et al. 2022, Section 5): N evaluations.

    ``randn_like`` is called once per step but the last.
    """
    return _dpmpp_2m(denoise, x, levels, 1, randn_like)


def _dpmpp_2m(denoise: Denoise, x: Tensor, levels: Tensor, eta: int, randn_like: RandnLike) -> Tensor:
    """In the variable lambda = -ln t the linear part is solved exactly; eta is 0 for the ODE, 1 for the SDE."""
    D_previous = h_previous = None
    for step, (t, t_next) in enumerate(pairwise(levels[:-1])):
        D = denoise(x, t, step).blended()
        h = (t / t_next).log()
        D_middle = D if D_previous is None else D + (D - D_previous) * (h / h_previous) / 2
        x = x * (-(1 + eta) * h).exp() - D_middle * (-(1 + eta) * h).expm1()
        if eta:
            x = x + randn_like(x) * (t_next * (-(-2 * h).expm1()).sqrt())
        D_previous, h_previous = D, h
    return denoise(x, levels[-2], len(levels) - 2).blended()
