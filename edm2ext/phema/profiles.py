"""Averaging profiles: how much the weights of each training time count in an average (specification 5.1, 5.4).

A profile is a density over the training time tau in [0, t]. Power profiles are what `PowerEMA` tracks; a target of a
reconstruction may also be exponential (the classic EMA) or a window (stochastic weight averaging). All are named by
their relative width sigma_rel = standard deviation / t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import hyp1f1

MAX_SIGMA_REL = 12**-0.5  # the width of gamma = 0, excluded
_UNIFORM_RATE = 1e-3  # exponentials whose rate times t is smaller are uniform


def sigma_rel_to_gamma(sigma_rel: ArrayLike) -> NDArray[np.float64]:
    """The exponent gamma of the power profile whose relative width is sigma_rel (Eq. 126), elementwise in float64.

    It is the largest of the three real roots of gamma^3 + 7 gamma^2 + (16 - q) gamma + (12 - q) with
    q = sigma_rel^-2, in Viète's trigonometric form. Raises ValueError outside 0 < sigma_rel < 12^-1/2 = 0.2886751.
    """
    sigma_rel = np.asarray(sigma_rel, dtype=np.float64)
    inside = (sigma_rel > 0) & (sigma_rel < MAX_SIGMA_REL)
    if not np.all(inside):
        raise ValueError(
            f"sigma_rel_to_gamma: sigma_rel must be between 0 and {MAX_SIGMA_REL:.7f}, got {sigma_rel[~inside]}"
        )
    q = sigma_rel**-2
    angle = np.arccos(-(1 + 18 * q) / (1 + 3 * q) ** 1.5)
    return (2 * np.sqrt(1 + 3 * q) * np.cos(angle / 3) - 7) / 3


def gamma_to_sigma_rel(gamma: ArrayLike) -> NDArray[np.float64]:
    """The relative width of the power profile with exponent gamma >= 0 (Eq. 123), elementwise in float64."""
    gamma = np.asarray(gamma, dtype=np.float64)
    if not np.all(gamma >= 0):
        raise ValueError(f"gamma_to_sigma_rel: gamma must not be negative, got {gamma[~(gamma >= 0)].tolist()}")
    return np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def power_beta(t_next: ArrayLike, dt: ArrayLike, sigma_rel: ArrayLike) -> NDArray[np.float64]:
    """The decay beta = (1 - dt / t_next)^(gamma + 1) of a step of dt images that ends at t_next (Eq. 127).

    Raises ValueError unless 0 <= dt <= t_next and t_next > 0.
    """
    t_next, dt = np.asarray(t_next, dtype=np.float64), np.asarray(dt, dtype=np.float64)
    if not np.all((t_next > 0) & (dt >= 0) & (dt <= t_next)):
        raise ValueError(f"power_beta: 0 <= dt <= t_next and t_next > 0 must hold, got dt={dt} and t_next={t_next}")
    return (1 - dt / t_next) ** (sigma_rel_to_gamma(sigma_rel) + 1)


def profile_product(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> NDArray[np.float64]:
    """The inner product of two power profiles (Eq. 151, symmetric form); times enter as a ratio, to stay in range."""
    t_a, gamma_a, t_b, gamma_b = np.broadcast_arrays(t_a, gamma_a, t_b, gamma_b)
    ratio, exponent = t_a / t_b, np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**exponent / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


@dataclass(frozen=True)
class Profile:
    """A profile of a certain shape that ends at time t: what the least-squares fit needs to know of it."""

    t: float
    times_power: Callable[[NDArray, NDArray], NDArray]  # inner products with the power profiles (t_i, gamma_i)
    times_itself: float
    cumulative: Callable[[NDArray], NDArray]  # the part before each time


def power_profile(sigma_rel: float, t: float) -> Profile:
    """(gamma + 1) tau^gamma / t^(gamma + 1), with the gamma of this width (Eqs. 2 and 126)."""
    gamma = float(sigma_rel_to_gamma(sigma_rel))
    return Profile(
        t,
        lambda t_i, gamma_i: profile_product(t_i, gamma_i, t, gamma),
        float(profile_product(t, gamma, t, gamma)),
        lambda tau: (np.clip(tau, 0, t) / t) ** (gamma + 1),
    )


def window_profile(sigma_rel: float, t: float) -> Profile:
    """The last sqrt(12) sigma_rel of the time, all of it with the same weight: stochastic weight averaging."""
    _check_width("window_profile", sigma_rel)
    width = 12**0.5 * sigma_rel * t
    start = t - width

    def times_power(t_i: NDArray, gamma_i: NDArray) -> NDArray:
        parts = [(np.minimum(edge, t_i) / t_i) ** (gamma_i + 1) for edge in (start, t)]
        return (parts[1] - parts[0]) / width

    return Profile(t, times_power, 1 / width, lambda tau: np.clip((tau - start) / width, 0, 1))


def exponential_profile(sigma_rel: float, t: float) -> Profile:
    """e^((tau - t) / L) / L, cut off at 0 and of integral 1: the classic EMA, with the L that gives this width.

    Away from 0, L = sigma_rel t, and the half-life is ln 2 times that.
    """
    _check_width("exponential_profile", sigma_rel)

    def excess(log_rate: float) -> float:  # variance of e^(-rate u) on [0, 1] less the one wanted
        rate = np.exp(log_rate)
        return rate**-2 - 0.25 / np.sinh(rate / 2) ** 2 - sigma_rel**2 if rate < 500 else rate**-2 - sigma_rel**2

    if excess(np.log(_UNIFORM_RATE)) <= 0:
        return window_profile(sigma_rel, t)
    rate = float(np.exp(brentq(excess, np.log(_UNIFORM_RATE), np.log(2 / sigma_rel), xtol=1e-14)))
    length, kept = t / rate, -np.expm1(-rate)

    def times_power(t_i: NDArray, gamma_i: NDArray) -> NDArray:
        # Integral of tau^gamma e^(tau / L) from 0 to x: x^(gamma + 1) e^(x / L) 1F1(1; gamma + 2; -x / L) / (gamma + 1)
        x = np.minimum(t_i, t)
        kummer = hyp1f1(1, gamma_i + 2, -x / length)
        return (x / t_i) ** (gamma_i + 1) * np.exp((x - t) / length) * kummer / (length * kept)

    return Profile(
        t,
        times_power,
        -np.expm1(-2 * rate) / (2 * length * kept**2),
        lambda tau: (np.exp((np.clip(tau, 0, t) - t) / length) - (1 - kept)) / kept,
    )


SHAPES: dict[str, Callable[[float, float], Profile]] = {
    "power": power_profile,
    "exponential": exponential_profile,
    "window": window_profile,
}


def _check_width(function: str, sigma_rel: float) -> None:
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(f"{function}: sigma_rel must be between 0 and {MAX_SIGMA_REL:.7f}, got {sigma_rel}")


def parse_sigma_rel_list(text: str) -> list[float]:
    """Widths from a comma-separated list, in which "..." continues the progression before it: "0.010,0.015,...,0.250".

    "..." needs two numbers before and one after, and a whole number of steps between. The result is sorted and without
    duplicates. Raises ValueError for anything else, and for widths outside the range of `sigma_rel_to_gamma`.
    """
    values: list[float] = []
    items = [item.strip() for item in text.split(",")]
    for i, item in enumerate(items):
        if item == "...":
            if len(values) < 2 or i + 1 == len(items) or items[i - 1] == "...":
                raise ValueError(f'parse_sigma_rel_list: "..." needs two numbers before and one after, got "{text}"')
            continue
        value = _parse_float(item, text)
        if i > 0 and items[i - 1] == "...":
            values += _progression(values[-2], values[-1], value, text)
        values.append(value)
    for value in values:
        if not 0 < value < MAX_SIGMA_REL:
            raise ValueError(f"parse_sigma_rel_list: widths must be between 0 and {MAX_SIGMA_REL:.7f}, got {value:g}")
    return sorted(set(values))


def _progression(first: float, second: float, last: float, text: str) -> list[float]:
    """The members strictly between second and last of the arithmetic progression first, second, ..., last."""
    step = second - first
    steps = (last - second) / step if step != 0 else 0.0
    if steps < 1 - 1e-4 or abs(steps - round(steps)) > 1e-4:
        raise ValueError(
            f'parse_sigma_rel_list: no whole number of steps of {step:g} leads from {second:g} to {last:g} in "{text}"'
        )
    return [round(second + (last - second) * k / round(steps), 12) for k in range(1, round(steps))]


def _parse_float(item: str, text: str) -> float:
    try:
        return float(item)
    except ValueError:
        raise ValueError(f'parse_sigma_rel_list: "{item}" in "{text}" is not a number') from None
