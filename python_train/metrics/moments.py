"""Mean and covariance of features, summed in float64 as they come, and the Fréchet distance between two (spec 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from python_train import UserError


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and unbiased covariance [D,D] of ``num`` feature vectors, float64."""

    num: int
    mu: Tensor
    sigma: Tensor


class Moments:
    """Sums of f and of f fᵀ over features f [D], float64 on a device."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.num = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Add features [N,D]."""
        features = features.to(self.sum)
        self.num += len(features)
        self.sum += features.sum(dim=0)
        self.outer += features.T @ features

    def merge(self, other: Moments) -> None:
        """Add what another has summed."""
        self.num += other.num
        self.sum += other.sum
        self.outer += other.outer

    def gaussian(self) -> Gaussian:
        """μ = Σf/n, Σ = (Σffᵀ − n μμᵀ)/(n − 1), on the CPU. Raises UserError for fewer than two features."""
        if self.num < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.num}")
        mu = self.sum / self.num
        sigma = (self.outer - self.num * torch.outer(mu, mu)) / (self.num - 1)
        return Gaussian(self.num, mu.cpu(), ((sigma + sigma.T) / 2).cpu())


def gaussian_of(features: Tensor, weights: Tensor | None = None) -> Gaussian:
    """The Gaussian of features [N,D], each counted ``weights`` [N] times (once without)."""
    features = features.to(torch.float64)
    weights = torch.ones(len(features), dtype=torch.float64) if weights is None else weights.to(torch.float64)
    num = float(weights.sum())
    mu = weights @ features / num
    centred = (features - mu) * weights.sqrt()[:, None]
    return Gaussian(round(num), mu, centred.T @ centred / (num - 1))


class FrechetDistance:
    """Distance to one Gaussian: ‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½).

    Σ₁Σ₂ has the eigenvalues of S Σ₂ S with S = Σ₁^½, which is symmetric and not negative: their square roots are
    summed, those that rounding has made negative counted as 0. S is computed once.
    """

    def __init__(self, reference: Gaussian) -> None:
        self.reference = reference
        values, vectors = torch.linalg.eigh(reference.sigma)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def __call__(self, other: Gaussian) -> float:
        """The distance. Raises UserError if the other has features of another length."""
        if other.mu.shape != self.reference.mu.shape:
            raise UserError(f"features of {len(other.mu)} numbers cannot be compared with {len(self.reference.mu)}")
        product = self.root @ other.sigma @ self.root
        overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
        means = (self.reference.mu - other.mu).square().sum()
        return float(means + self.reference.sigma.trace() + other.sigma.trace() - 2 * overlap)
