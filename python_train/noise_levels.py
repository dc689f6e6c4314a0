"""How well a network denoises at each noise level, beside what it expects of itself: u(sigma) (spec 4.1; Eq. 21)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from python_train.network import Precond


@dataclass(frozen=True)
class NoiseLevel:
    """At one sigma: lambda(sigma) times the mean squared error of the denoised images, which is about 1 for a network
    that knows nothing but the data's mean and standard deviation; and exp(u(sigma)), the error that it expects."""

    sigma: float
    error: float
    expected: float


def training_levels(P_mean: float, P_std: float, levels: int = 8, width: float = 2.0) -> list[float]:
    """Noise levels over the middle of the training distribution: ``width`` standard deviations to either side."""
    return (torch.linspace(-width, width, levels, dtype=torch.float64) * P_std + P_mean).exp().tolist()


@torch.no_grad()
def measure(
    net: Precond, images: Tensor, labels: Tensor | None, sigmas: Sequence[float], noise: Tensor
) -> list[NoiseLevel]:
    """Errors for clean images [N, C, H, W] of the network's domain with the same standard normal noise [N, C, H, W] at
    every level. The network's mode is not changed."""
    levels = []
    for value in sigmas:
        sigma = torch.full([len(images), 1, 1, 1], value, device=images.device)
        denoised, logvar = net(images + sigma * noise, sigma, labels, return_logvar=True)
        weight = (value**2 + net.sigma_data**2) / (value * net.sigma_data) ** 2
        error = weight * (denoised.float() - images).square().mean()
        levels.append(NoiseLevel(value, float(error), float(logvar.float().exp().mean())))
    return levels


def as_stats(levels: Sequence[NoiseLevel]) -> dict[str, float]:
    """Entries of statistics: "Noise/0.449/error" and "Noise/0.449/expected"."""
    return {
        f"Noise/{level.sigma:.3g}/{kind}": getattr(level, kind) for level in levels for kind in ("error", "expected")
    }
