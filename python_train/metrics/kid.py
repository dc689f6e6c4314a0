"""Kernel distance (KID): squared maximum mean discrepancy with a polynomial kernel, unbiased at every sample size."""

from __future__ import annotations

import torch
from torch import Tensor

from python_train import UserError

ROWS = 512  # of a kernel matrix at a time


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _check(generated: Tensor, reference: Tensor) -> None:
    for name, features in (("generated", generated), ("reference", reference)):
        if len(features) < 2:
            raise UserError(f"KID needs at least 2 {name} images, got {len(features)}")


def _within(x: Tensor, weights: Tensor) -> Tensor:
    """Mean kernel between different rows of x [N,D], row i counted weights[b,i] times: [B].

    Two copies of one row are no pair of different ones: a resample with repetitions has no bias from them.
    """
    total = torch.zeros(len(weights), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        kernel = _kernel(x[rows], x)
        kernel[:, rows].fill_diagonal_(0)
        total += (weights[:, rows] @ kernel * weights).sum(dim=1)
    return total / (weights.sum(dim=1).square() - weights.square().sum(dim=1))


def _between(x: Tensor, weights: Tensor, y: Tensor) -> Tensor:
    """Mean kernel between rows of x [N,D], counted as in `_within`, and of y [M,D]: [B]."""
    total = torch.zeros(len(weights), dtype=x.dtype, device=x.device)
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        total += weights[:, rows] @ _kernel(x[rows], y).mean(dim=1)
    return total / weights.sum(dim=1)


def resampled_kid(generated: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    """KID of B resamples of the generated features, all in one pass over the kernel matrices.

    Args:
        generated, reference: features [N,D] and [M,D].
        weights: [B,N], how often each generated image is in each resample.

    Returns float64 [B] on the CPU. Raises UserError for fewer than 2 images of a kind.
    """
    _check(generated, reference)
    x, y = generated.to(torch.float64), reference.to(torch.float64)
    weights = weights.to(x)
    yy = _within(y, torch.ones(1, len(y), dtype=y.dtype, device=y.device))
    return (_within(x, weights) + yy - 2 * _between(x, weights, y)).cpu()


def kid(generated: Tensor, reference: Tensor) -> float:
    """KID of features [N,D] and [M,D] from all pairs, kernel (x·y/D + 1)³ in float64."""
    return float(resampled_kid(generated, reference, torch.ones(1, len(generated))))


def check_subset(generated: int, reference: int, size: int) -> None:
    """Raise UserError unless subsets of ``size`` can be drawn from so many images."""
    for name, count in (("generated", generated), ("reference", reference)):
        if count < size:
            raise UserError(f"KID of subsets of {size} images: there are only {count} {name} ones")


def subset_kid(generated: Tensor, reference: Tensor, size: int, subsets: int = 100, seed: int = 0) -> list[float]:
    """KID of random subsets of ``size`` images of each kind, as publications average it.

    Raises UserError where there are fewer images than that.
    """
    _check(generated, reference)
    check_subset(len(generated), len(reference), size)
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]

    return [kid(subset(generated), subset(reference)) for _ in range(subsets)]
