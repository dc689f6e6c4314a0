"""What error of the weights to expect of a fit: how the weights moved, as far as stored averages show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from edm2ext.phema.fit import ROUNDING, Fit, cumulative, quadrature
from edm2ext.phema.profiles import sigma_rel_to_gamma

_TRACKED_IN = ROUNDING["fp32"]  # what `PowerEMA` rounds to at every update


@dataclass(frozen=True)
class Motion:
    """The part of the weights' way that stored averages do not tell: a random walk whose speed changes.

    nimg, std [N]: of the stored averages; edges [K + 1]: 0 and their times; rates [K]: mean square step of a weight per
    image in each interval between them, NaN where nothing tells; samples [N, S]: the same S weights of each; covariance
    [N, N]: of the errors that rounding made in them; updates: number that the last average was made by, 0 = unknown.
    """

    nimg: NDArray[np.float64]
    std: NDArray[np.float64]
    edges: NDArray[np.float64]
    rates: NDArray[np.float64]
    samples: NDArray[np.float32]
    covariance: NDArray[np.float64]
    updates: int

    def expected_error(self, fit: Fit, closest: Fit) -> float:
        """Expected |result - what tracking it would have given| / |result| over all weights, in L2.

        closest: the fit of kind "weights" to the same target. By how much other coefficients miss its result is seen in
        the samples. What it misses itself, and what no sample shows, is -integral of C dtheta, with C the cumulative of
        the difference of the profiles: integral of rate C^2 in square.
        """
        tau, weights = quadrature(self.edges)
        wanted = fit.target.profile(float(self.edges[-1])).cumulative(tau)
        missed = closest.coefs @ cumulative(self.nimg, self.std, tau) - wanted
        unseen = np.repeat(self.rates, len(tau) // len(self.rates)) @ (weights * missed**2)
        seen = _mean_square((fit.coefs - closest.coefs) @ self.samples)
        rounded = fit.coefs @ self.covariance @ fit.coefs
        result = _mean_square(fit.coefs @ self.samples)
        # Tracking the target would have rounded as often as tracking the inputs did.
        alike = self.updates * float(fit.target.nimg or self.edges[-1]) / float(self.edges[-1])
        tracked = _rounding_of_updates(alike, fit.target.sigma_rel) * result
        return float(np.sqrt((unseen + seen + rounded + tracked) / result)) if result > 0 else 0.0


def estimate_motion(
    nimg: NDArray, std: NDArray, samples: NDArray, rounding: NDArray, updates: Sequence[int] = ()
) -> Motion:
    """The speed of the random walk by which each stored average differs from what the others make of it.

    nimg, std, rounding [N]: of the stored averages, ordered by time; samples [N, S]: the same S weights of each, in
    float32; updates [N]: that each was made by, where that is known. What the others foretell of an average, such as a
    steady drift, they also foretell of an average that was not stored: only the rest becomes an error.
    """
    times = np.unique(nimg)
    edges = np.concatenate([[0.0], times])
    covariance = _rounding_covariance(nimg, std, samples, rounding, updates)
    rates = np.full(len(times), np.nan)
    if len(nimg) > 1:
        shortest = [min(np.flatnonzero(nimg == time), key=lambda i: std[i]) for time in times]
        held_out, lengths = _held_out(nimg, std, edges)
        held_out, lengths = held_out[shortest], lengths[shortest]
        squared = np.mean((held_out @ samples.astype(np.float64)) ** 2, axis=1)
        rates = np.maximum(0, squared - np.einsum("ki,ij,kj->k", held_out, covariance, held_out)) / lengths
    return Motion(nimg, std, edges, rates, samples, covariance, updates[-1] if len(updates) else 0)


def _held_out(nimg: NDArray, std: NDArray, edges: NDArray) -> tuple[NDArray, NDArray]:
    """Of each average, coefficients [N, N] of its difference from the best estimate by all others, and the integral [N]
    of the squared cumulative of that difference.

    Both are in the inverse of the averages' Gram matrix, which is made of the QR decomposition of their differences
    from the last one, since coefficients add up to 0.
    """
    tau, weights = quadrature(edges)
    stored = cumulative(nimg, std, tau) * np.sqrt(weights)
    last = int(np.argmax(nimg))
    others = np.delete(stored, last, axis=0) - stored[last]
    scale = np.linalg.norm(others, axis=1)
    root = np.linalg.qr((others / scale[:, None]).T, mode="r")
    differences = np.insert(np.diag(1 / scale), last, -1 / scale, axis=0)  # [N, N - 1]
    half = solve_triangular(root.T, differences.T, lower=True)
    inverse = half.T @ half
    diagonal = np.diag(inverse)
    return inverse / diagonal[:, None], 1 / diagonal


def _rounding_covariance(
    nimg: NDArray, std: NDArray, samples: NDArray, rounding: NDArray, updates: Sequence[int]
) -> NDArray:
    """[N, N]: of the errors of averages that were rounded at each update, which later ones of the same width inherit,
    and once more when they were stored."""
    size = np.sqrt(np.mean(samples**2, axis=1, dtype=np.float64))
    steps = np.array(updates if len(updates) else np.zeros(len(nimg)))
    ratio = np.minimum.outer(nimg, nimg) / np.maximum.outer(nimg, nimg)
    inherited = np.where(np.equal.outer(std, std), ratio ** (sigma_rel_to_gamma(std)[:, None] + 1), 0)
    tracked = inherited * _rounding_of_updates(np.minimum.outer(steps, steps), std[:, None])
    return (tracked + np.diag(rounding**2)) * np.outer(size, size)


def _rounding_of_updates(updates: NDArray | float, std: NDArray | float) -> NDArray:
    """Relative variance that rounding makes in an average over so many updates: the integral of the squared decay."""
    return _TRACKED_IN**2 * updates / (2 * sigma_rel_to_gamma(std) + 3)


def _mean_square(values: NDArray) -> float:
    return float(np.mean(values**2, dtype=np.float64))
