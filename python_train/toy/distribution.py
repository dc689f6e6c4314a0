"""Ground truth of the toy system: two classes, each a tree of thin Gaussian mixtures (spec 11.1), known exactly."""

from __future__ import annotations

from math import cos, log, pi, sin
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from python_train import UserError

DEPTH, COMPONENTS = 7, 8  # levels of branches; Gaussians along each branch
_ORIGIN = np.array([0.0030, 0.0325])
_SCALE = np.array([1.3136, 1.3844])
_ROOT_ANGLES = {"A": pi / 4, "B": 5 * pi / 4}
_POSITIONS = np.linspace(0.07, 0.93, COMPONENTS)  # along a branch of length 1
_CHUNK = 2**22  # elements of the largest intermediate of a density evaluation


class Branch(NamedTuple):
    """COMPONENTS Gaussians of one weight and covariance, evenly spaced on a line."""

    weight: float  # of each component, before normalisation
    centre: NDArray[np.float64]  # [2], the middle of the branch
    step: NDArray[np.float64]  # [2], from its start to its end
    covariance: NDArray[np.float64]  # [2, 2]

    def means(self) -> NDArray[np.float64]:
        """Of the components, [COMPONENTS, 2]."""
        return self.centre + self.step * (_POSITIONS - 0.5)[:, None]


class TreeMixture:
    """The mixture of the branches of one class, "A" or "B", or of both, "AB", optionally smoothed by noise.

    ``weights`` [branches] are those of each single component and sum to 1 over all of them; ``means``
    [branches, 8, 2]; ``covariances`` [branches, 2, 2] are shared by the components of a branch. All float32.
    """

    def __init__(self, classes: str = "A", device: torch.device | str = "cpu") -> None:
        if classes not in ("A", "B", "AB"):
            raise UserError(f"TreeMixture: classes must be 'A', 'B' or 'AB', got {classes!r}")
        random = np.random.RandomState(2)
        trees = {name: _grow(random, 0, _ORIGIN, angle) for name, angle in _ROOT_ANGLES.items()}
        branches = [branch for name in classes for branch in trees[name]]
        weights = np.array([branch.weight for branch in branches])
        covariances = np.stack([branch.covariance for branch in branches])
        self.weights = _float32(weights / (weights.sum() * COMPONENTS), device)
        self.means = _float32(np.stack([branch.means() for branch in branches]), device)
        self.covariances = _float32(covariances, device)
        # Sigma = U diag(variances) U^T, so that Sigma + sigma^2 I has the same axes U and variances + sigma^2.
        variances, axes = np.linalg.eigh(covariances)
        self.variances, self.axes = _float32(variances, device), _float32(axes, device)
        t = torch.from_numpy(_POSITIONS - 0.5).to(device, torch.float32)
        self._powers = torch.stack([torch.ones_like(t), t, t**2])
        self._steps = _float32(np.einsum("bca,bc->ba", axes, [branch.step for branch in branches]), device)
        self._centres = _float32(np.einsum("bca,bc->ba", axes, [branch.centre for branch in branches]), device)
        self._cumulative = np.concatenate([[0], np.cumsum(np.repeat(self.weights.cpu().double().numpy(), COMPONENTS))])

    def log_density(self, x: Tensor, sigma: Tensor | float = 0) -> Tensor:
        """log p(x; sigma) [N] of points x [N, 2], smoothed by noise of standard deviation sigma (scalar or [N])."""
        return torch.cat([self._evaluate(*part)[0] for part in self._parts(x, sigma)])

    def score(self, x: Tensor, sigma: Tensor | float = 0) -> Tensor:
        """The gradient of `log_density` with respect to x, [N, 2] (Eqs. 7 to 10 of the autoguidance paper)."""
        return torch.cat([self._evaluate(*part)[1] for part in self._parts(x, sigma)])

    def sample(self, count: int, sigma: Tensor | float = 0, generator: torch.Generator | None = None) -> Tensor:
        """Points [count, 2] of p(x; sigma); sigma is a scalar or [count].

        Components are picked by a table of 65536 entries, whose boundaries are the rounded cumulative weights.
        """
        device = self.means.device
        table = np.diff(np.round(self._cumulative * 65536)).astype(np.int64)
        table = torch.from_numpy(np.repeat(np.arange(len(table)), table)).to(device)
        component = table[torch.randint(len(table), [count], generator=generator, device=device)]
        branch = component // COMPONENTS
        noise = torch.randn(count, 2, generator=generator, device=device)
        deviations = (self.variances[branch] + _column(sigma, device) ** 2).sqrt()
        spread = (self.axes[branch] @ (deviations * noise)[:, :, None])[:, :, 0]
        return self.means.flatten(0, 1)[component] + spread

    def _parts(self, x: Tensor, sigma: Tensor | float) -> list[tuple[Tensor, Tensor]]:
        sigma = _column(sigma, x.device).expand(len(x), 1)
        size = max(1, _CHUNK // (len(self.weights) * COMPONENTS))
        return list(zip(x.split(size), sigma.split(size), strict=True))

    def _evaluate(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log p [N] and its gradient [N, 2] of points x [N, 2], sigma [N, 1].

        In the coordinates of its axes, a branch's components lie at y + t * step from x: the logarithm of each one's
        density is a polynomial of 2nd degree in t, whose coefficients [N, branches] are the branch's.
        """
        degree0, degree1, degree2 = self.weights.log() - log(2 * pi), 0, 0
        ys, precisions = [], []
        for axis, step, centre, variance in zip(
            self.axes.unbind(-1),
            self._steps.unbind(-1),
            self._centres.unbind(-1),
            self.variances.unbind(-1),
            strict=True,
        ):
            precision = 1 / (variance + sigma**2)
            y = centre - x @ axis.T
            weighted = y * precision
            degree0 = degree0 + (precision.log() - y * weighted) / 2
            degree1 = degree1 - weighted * step
            degree2 = degree2 - precision * (step**2 / 2)
            ys.append(y)
            precisions.append(precision)
        # No component's logarithm is above the largest polynomial's peak, and the largest is little below it.
        t = (degree1 / (-2 * degree2)).clamp(-0.5, 0.5)
        peak = (degree0 + t * (degree1 + t * degree2)).amax(1, keepdim=True)
        density = (torch.stack([degree0 - peak, degree1, degree2], dim=-1) @ self._powers).exp_()
        mass, first_moment = (density @ self._powers[:2].T).unbind(-1)  # over the components of a branch
        total = mass.sum(1)
        pulls = [
            (mass * y + first_moment * step) * precision
            for y, step, precision in zip(ys, self._steps.unbind(-1), precisions, strict=True)
        ]
        gradient = sum(pull @ axis for pull, axis in zip(pulls, self.axes.unbind(-1), strict=True))
        return total.log() + peak[:, 0], gradient / total[:, None]


def _grow(random: np.random.RandomState, depth: int, pos: NDArray[np.float64], angle: float) -> list[Branch]:
    """The branch at pos and all that grow from its end, depth first."""
    if depth >= DEPTH:
        return []
    u = np.array([cos(angle), sin(angle)])
    dist = 0.292 * 0.8**depth * (1 + 0.2 * random.randn())
    thick = 0.2 * 0.8**depth / dist
    size = _SCALE * dist * 0.06
    along = np.outer(u, u)
    covariance = (along + (np.eye(2) - along) * thick**2) * np.outer(size, size)
    end = pos + u * dist
    branches = [Branch(dist * 0.5**depth, (pos + end) / 2 * _SCALE, u * dist * _SCALE, covariance)]
    for sign in (1, -1):
        branches += _grow(random, depth + 1, end, angle + sign * 0.7**depth * (1 + 0.2 * random.randn()))
    return branches


def _float32(values: NDArray[np.float64], device: torch.device | str) -> Tensor:
    return torch.from_numpy(values).to(device, torch.float32)


def _column(sigma: Tensor | float, device: torch.device) -> Tensor:
    return torch.as_tensor(sigma, dtype=torch.float32, device=device).reshape(-1, 1)
