"""Quality and diversity apart: precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al.
2020).

A set of features is taken for the union of balls around them, each as large as the distance to its k-th neighbour.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from python_train import UserError

ROWS = 512  # of a distance matrix at a time
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
MOST_NEIGHBOURS = max(PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS)


@dataclass(frozen=True)
class Manifold:
    """What each image contributes; the metrics are the means. float64, on the CPU."""

    precision: Tensor  # [generated]: 1 within a ball of the reference
    recall: Tensor  # [reference]: 1 within a ball of the generated ones
    density: Tensor  # [generated]: balls of the reference it is in, divided by k
    coverage: Tensor  # [reference]: 1 where its own ball holds a generated image


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return (norms - 2 * x @ y.T).clamp(min=0)


def _squared_radii(x: Tensor, ks: tuple[int, ...]) -> Tensor:
    """Squared distance of each row of x [N,D] to its k-th nearest other row: [len(ks), N]."""
    radii = []
    for start in range(0, len(x), ROWS):
        block = _squared_distances(x[start : start + ROWS], x)
        block[:, start : start + ROWS].fill_diagonal_(torch.inf)
        nearest = block.topk(max(ks), largest=False, sorted=True).values
        radii.append(nearest[:, [k - 1 for k in ks]].T)
    return torch.cat(radii, dim=1)


def check_sizes(generated: int, reference: int) -> None:
    """Raise UserError unless these are enough images."""
    for name, count in (("generated", generated), ("reference", reference)):
        if count <= MOST_NEIGHBOURS:
            raise UserError(
                f"precision, recall, density and coverage take the {MOST_NEIGHBOURS} nearest neighbours of an image: "
                f"{count} {name} images are too few"
            )


def manifold(generated: Tensor, reference: Tensor) -> Manifold:
    """Compare features [N,D] and [M,D], in float64. Precision and recall take k = 3, density and coverage k = 5.

    Raises UserError for as few images as that.
    """
    check_sizes(len(generated), len(reference))
    x, y = generated.to(torch.float64), reference.to(torch.float64)
    (radius_x,) = _squared_radii(x, (PRECISION_NEIGHBOURS,))
    radius_y, wide_radius_y = _squared_radii(y, (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS))
    precision, density = [], []
    recall = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    coverage = torch.zeros_like(recall)
    for start in range(0, len(x), ROWS):
        distances = _squared_distances(x[start : start + ROWS], y)
        precision.append((distances <= radius_y).any(dim=1))
        density.append((distances < wide_radius_y).sum(dim=1).to(torch.float64) / DENSITY_NEIGHBOURS)
        recall |= (distances <= radius_x[start : start + ROWS, None]).any(dim=0)
        coverage |= (distances < wide_radius_y).any(dim=0)
    parts = (torch.cat(precision), recall, torch.cat(density), coverage)
    return Manifold(*(part.to("cpu", torch.float64) for part in parts))
