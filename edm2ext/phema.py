"""Power-function EMA and its post-hoc reconstruction (specification section 5, Eqs. 121 to 151)."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from edm2ext import ops

MAX_SIGMA_REL = 12**-0.5  # the width of gamma = 0, excluded


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


def solve_coefficients(
    in_nimg: ArrayLike, in_std: ArrayLike, out_nimg: ArrayLike, out_std: ArrayLike
) -> NDArray[np.float64]:
    """Coefficients [inputs, outputs] that combine stored averages into new ones (5.4, Eqs. 128 to 151), in float64.

    in_nimg, in_std [inputs]: time and sigma_rel of the stored averages; out_nimg, out_std [outputs] or scalars: those
    wanted. Each column is the least-squares fit of the wanted profile by the stored ones, divided by its sum. The
    system is solved with its diagonal scaled to 1, which improves its condition number tenfold.

    Raises ValueError for shapes that do not match, times that are not positive, an average stored twice, or a wanted
    time beyond the last stored one.
    """
    in_nimg, in_std = _vectors("in_nimg", in_nimg, "in_std", in_std)
    out_nimg, out_std = _vectors("out_nimg", out_nimg, "out_std", out_std)
    stored = list(zip(in_nimg.tolist(), in_std.tolist(), strict=True))
    if not stored:
        raise ValueError("solve_coefficients: in_nimg must not be empty")
    if len(set(stored)) < len(stored):
        twice = next(item for item in stored if stored.count(item) > 1)
        raise ValueError(f"solve_coefficients: the average at nimg={twice[0]:g}, sigma_rel={twice[1]:g} is given twice")
    if not np.all(in_nimg > 0) or not np.all(out_nimg > 0):
        raise ValueError("solve_coefficients: in_nimg and out_nimg must be positive")
    if np.any(out_nimg > in_nimg.max()):
        raise ValueError(
            f"solve_coefficients: out_nimg must not exceed the last input's time {in_nimg.max():.0f}, "
            f"got {out_nimg.max():.0f}"
        )
    in_gamma, out_gamma = sigma_rel_to_gamma(in_std), sigma_rel_to_gamma(out_std)
    scale = profile_product(in_nimg, in_gamma, in_nimg, in_gamma) ** -0.5
    products = profile_product(in_nimg[:, None], in_gamma[:, None], in_nimg[None, :], in_gamma[None, :])
    targets = profile_product(in_nimg[:, None], in_gamma[:, None], out_nimg[None, :], out_gamma[None, :])
    scaled = np.linalg.solve(products * scale[:, None] * scale[None, :], targets * scale[:, None])
    coefficients = scaled * scale[:, None]
    return coefficients / coefficients.sum(axis=0)


def profile_product(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> NDArray[np.float64]:
    """The inner product of two power profiles (Eq. 151, symmetric form); times enter as a ratio, to stay in range."""
    t_a, gamma_a, t_b, gamma_b = np.broadcast_arrays(t_a, gamma_a, t_b, gamma_b)
    ratio, exponent = t_a / t_b, np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**exponent / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def _vectors(name: str, nimg: ArrayLike, std_name: str, std: ArrayLike) -> tuple[NDArray, NDArray]:
    nimg, std = np.atleast_1d(np.asarray(nimg, np.float64)), np.atleast_1d(np.asarray(std, np.float64))
    if nimg.ndim > 1 or std.ndim > 1 or (len(nimg) != len(std) and 1 not in (len(nimg), len(std))):
        raise ValueError(
            f"solve_coefficients: {name} and {std_name} must be vectors of one length, "
            f"got shapes {nimg.shape} and {std.shape}"
        )
    nimg, std = np.broadcast_arrays(nimg, std)
    return nimg, std


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


class PowerEMA:
    """Power-function averages of a list of parameters, one profile for each sigma_rel (5.1).

    The averages start as copies of the parameters, in float32 at least, and live beside them. Buffers are not tracked.
    """

    def __init__(self, params: Iterable[Tensor], sigma_rels: Sequence[float] = (0.05, 0.10)) -> None:
        self.params = list(params)
        self.sigma_rels = [float(sigma_rel) for sigma_rel in sigma_rels]
        sigma_rel_to_gamma(self.sigma_rels)  # raises for a width out of range
        self.profiles = [[_copy(param) for param in self.params] for _ in self.sigma_rels]

    def update(self, nimg_next: int, batch: int) -> None:
        """Take in the parameters after an optimizer step of `batch` images that ended at `nimg_next` images."""
        ops.ema_update_(self.profiles, self.params, self.weights(nimg_next, batch))

    def weights(self, nimg_next: int, batch: int) -> list[float]:
        """1 - beta of each profile: how much of the parameters `update` takes in (Eq. 127)."""
        return (1 - power_beta(nimg_next, batch, self.sigma_rels)).tolist()

    def state_dict(self) -> dict[str, list]:
        """The widths and the averages themselves (not copies)."""
        return {
            "sigma_rels": list(self.sigma_rels),
            "profiles": [list(profile) for profile in self.profiles],
        }

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Copy averages saved by `state_dict` into these. Raises ValueError if widths, counts or shapes differ."""
        if list(state["sigma_rels"]) != self.sigma_rels:
            raise ValueError(f"PowerEMA: the state has sigma_rels {state['sigma_rels']}, expected {self.sigma_rels}")
        shapes = [[list(ema.shape) for ema in profile] for profile in self.profiles]
        if [[list(ema.shape) for ema in profile] for profile in state["profiles"]] != shapes:
            raise ValueError("PowerEMA: the state's averages do not have the shapes of the parameters")
        for profile, saved in zip(self.profiles, state["profiles"], strict=True):
            for ema, value in zip(profile, saved, strict=True):
                ema.copy_(value)


def _copy(param: Tensor) -> Tensor:
    return param.detach().to(torch.promote_types(param.dtype, torch.float32), copy=True)
