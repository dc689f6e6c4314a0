"""Which combination of stored averages is closest to a wanted one, and how close (5.4, Eqs. 128 to 151)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, lstsq

from edm2ext.phema.profiles import SHAPES, Profile, power_profile, profile_product, sigma_rel_to_gamma

# Root-mean-square relative error of rounding to each way of storing weights, measured on normal numbers. "fp16+8" is a
# float16 with eight more bits in a file of its own (`edm2ext.phema.stored`).
ROUNDING: dict[str, float] = {"fp16": 2.07e-4, "bf16": 1.66e-3, "fp16+8": 8.1e-7, "fp32": 2.5e-8}
STORAGE_OF_DTYPE = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
FITS = ("weights", "profile")
_NODES = 8  # of the quadrature in each interval between stored times


@dataclass(frozen=True)
class Target:
    """An average that is wanted: its relative width, the time it ends at (None = that of the last input), its shape."""

    sigma_rel: float
    nimg: float | None = None
    shape: str = "power"

    def profile(self, last: float) -> Profile:
        """The profile, of an average that ends at `last` unless it says otherwise. ValueError if it is none."""
        if self.shape not in SHAPES:
            raise ValueError(f"Target: shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        return SHAPES[self.shape](self.sigma_rel, last if self.nimg is None else self.nimg)


@dataclass(frozen=True)
class Fit:
    """A combination of N stored averages: coefficients [N] (0 where an average ends after the target), and how good.

    profile_error is the L2 norm of the difference of the profiles relative to the target's; sigma_rel the width that
    the combined profile has.
    """

    target: Target
    coefs: NDArray[np.float64]
    profile_error: float
    sigma_rel: float

    @property
    def sum_abs(self) -> float:
        """Sum of |x|: by how much errors that all inputs share the sign of are amplified."""
        return float(np.abs(self.coefs).sum())

    @property
    def norm(self) -> float:
        """Root of the sum of x^2: by how much independent errors of the inputs are amplified."""
        return float(np.linalg.norm(self.coefs))

    def rounding_noise(self, rounding: ArrayLike) -> float:
        """Expected relative error of the result from inputs of these relative rounding errors ([N] or a number)."""
        return float(np.linalg.norm(self.coefs * rounding))


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
    _check_times(in_nimg, in_std, out_nimg)
    profiles = [power_profile(std, t) for t, std in zip(out_nimg.tolist(), out_std.tolist(), strict=True)]
    return _System(in_nimg, in_std).solve(profiles)


def fit(in_nimg: ArrayLike, in_std: ArrayLike, targets: Sequence[Target], kind: str = "weights") -> list[Fit]:
    """The best combination of stored averages for each target; of those that end after it, none is used.

    in_nimg, in_std [N]: time and sigma_rel of the stored averages, in any order. kind: what is made as small as
    possible. "profile" is the published way, `solve_coefficients`: the L2 norm of the difference of the profiles.
    "weights" is the error of the weights to expect if they move as a random walk: the same norm of the difference of
    the cumulative profiles, with coefficients of sum 1. The two agree on widths near the tracked ones; on wide ones,
    the latter is ten times as close and more. All targets of one time share a system of equations. Raises ValueError
    as `solve_coefficients` does, for a target before the first average, and for an unknown kind.
    """
    if kind not in FITS:
        raise ValueError(f"fit: kind must be one of {', '.join(FITS)}, got {kind!r}")
    in_nimg, in_std = _vectors("in_nimg", in_nimg, "in_std", in_std)
    profiles = [target.profile(in_nimg.max(initial=0)) for target in targets]
    times = np.array([profile.t for profile in profiles])
    _check_times(in_nimg, in_std, times)
    if np.any(times < in_nimg.min()):
        raise ValueError(
            f"solve_coefficients: out_nimg must not be before the first input's time {in_nimg.min():.0f}, "
            f"got {times.min():.0f}"
        )
    fits: dict[int, Fit] = {}
    for time in dict.fromkeys(times.tolist()):
        used = in_nimg <= time
        system = _System(in_nimg[used], in_std[used])
        chosen = np.flatnonzero(times == time).tolist()
        solve = system.solve if kind == "profile" else system.solve_cumulative
        solved = solve([profiles[m] for m in chosen])
        for m, column in zip(chosen, solved.T, strict=True):
            coefs = np.zeros(len(in_nimg))
            coefs[used] = column
            fits[m] = Fit(targets[m], coefs, system.error(profiles[m], column), system.width(time, column))
    return [fits[m] for m in range(len(targets))]


class _System:
    """The normal equations of the fit by some stored averages (Eqs. 144 to 151)."""

    def __init__(self, nimg: NDArray, std: NDArray) -> None:
        self.nimg, self.std, self.gamma = nimg, std, sigma_rel_to_gamma(std)
        scale = profile_product(nimg, self.gamma, nimg, self.gamma) ** -0.5
        products = profile_product(nimg[:, None], self.gamma[:, None], nimg[None, :], self.gamma[None, :])
        self.scale, self.scaled = scale, products * scale[:, None] * scale[None, :]

    def solve(self, profiles: Sequence[Profile]) -> NDArray:
        """Coefficients [inputs, profiles], each column divided by its sum."""
        targets = np.stack([profile.times_power(self.nimg, self.gamma) for profile in profiles], axis=1)
        coefficients = np.linalg.solve(self.scaled, targets * self.scale[:, None]) * self.scale[:, None]
        return coefficients / coefficients.sum(axis=0)

    def solve_cumulative(self, profiles: Sequence[Profile]) -> NDArray:
        """Coefficients [inputs, profiles] of sum 1 for the least difference of the cumulative profiles.

        An average that ends last has the coefficient 1 less all others, so that its cumulative is subtracted from all.
        """
        tau, weights = quadrature(np.concatenate([[0.0], np.unique(self.nimg)]))
        root = np.sqrt(weights)[:, None]
        last = int(np.argmax(self.nimg))
        stored = (cumulative(self.nimg, self.std, tau).T) * root
        wanted = np.stack([profile.cumulative(tau) for profile in profiles], axis=1) * root
        others = np.delete(stored, last, axis=1) - stored[:, [last]]
        scale = np.linalg.norm(others, axis=0)
        found = _least_squares(others / scale, wanted - stored[:, [last]]) / scale[:, None]
        return np.insert(found, last, 1 - found.sum(axis=0), axis=0)

    def error(self, profile: Profile, coefs: NDArray) -> float:
        """|sum of x_i p_i - p| / |p|, L2 norms over the time."""
        x = coefs / self.scale
        squared = x @ (self.scaled @ x - 2 * profile.times_power(self.nimg, self.gamma) * self.scale)
        return float(np.sqrt(max(0.0, squared / profile.times_itself + 1)))

    def width(self, t: float, coefs: NDArray) -> float:
        """Standard deviation of the combined profile, relative to t."""
        mean = coefs @ (self.nimg / t * (self.gamma + 1) / (self.gamma + 2))
        square = coefs @ ((self.nimg / t) ** 2 * (self.gamma + 1) / (self.gamma + 3))
        return float(np.sqrt(max(0.0, square - mean**2)))


def _least_squares(a: NDArray, b: NDArray) -> NDArray:
    """x [n, k] for the least |a x - b|: by normal equations, corrected twice, which is as exact as the QR decomposition
    and far faster; by that where a is too ill-conditioned for them."""
    try:
        factor = cho_factor(a.T @ a, lower=True)
    except LinAlgError:
        return lstsq(a, b, lapack_driver="gelsy")[0]
    x = cho_solve(factor, a.T @ b)
    for _ in range(2):
        x += cho_solve(factor, a.T @ (b - a @ x))
    return x


def quadrature(edges: NDArray) -> tuple[NDArray, NDArray]:
    """Nodes and weights of Gauss and Legendre in every interval."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (nodes + 1)).ravel(), (half * weights).ravel()


def cumulative(nimg: NDArray, std: NDArray, tau: NDArray) -> NDArray:
    """[N, times]: the part of each power profile before each time."""
    ratio = np.minimum(tau[None, :] / nimg[:, None], 1)
    return ratio ** (sigma_rel_to_gamma(std)[:, None] + 1)


def _check_times(in_nimg: NDArray, in_std: NDArray, out_nimg: NDArray) -> None:
    stored = list(zip(in_nimg.tolist(), in_std.tolist(), strict=True))
    if not stored:
        raise ValueError("solve_coefficients: in_nimg must not be empty")
    if len(set(stored)) < len(stored):
        seen: set[tuple[float, float]] = set()
        twice = next(item for item in stored if item in seen or seen.add(item))
        raise ValueError(f"solve_coefficients: the average at nimg={twice[0]:g}, sigma_rel={twice[1]:g} is given twice")
    if not np.all(in_nimg > 0) or not np.all(out_nimg > 0):
        raise ValueError("solve_coefficients: in_nimg and out_nimg must be positive")
    if np.any(out_nimg > in_nimg.max()):
        raise ValueError(
            f"solve_coefficients: out_nimg must not exceed the last input's time {in_nimg.max():.0f}, "
            f"got {out_nimg.max():.0f}"
        )


def _vectors(name: str, nimg: ArrayLike, std_name: str, std: ArrayLike) -> tuple[NDArray, NDArray]:
    nimg, std = np.atleast_1d(np.asarray(nimg, np.float64)), np.atleast_1d(np.asarray(std, np.float64))
    if nimg.ndim > 1 or std.ndim > 1 or (len(nimg) != len(std) and 1 not in (len(nimg), len(std))):
        raise ValueError(
            f"solve_coefficients: {name} and {std_name} must be vectors of one length, "
            f"got shapes {nimg.shape} and {std.shape}"
        )
    nimg, std = np.broadcast_arrays(nimg, std)
    return nimg, std
