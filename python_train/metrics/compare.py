"""All metrics of one set of features against another, with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from python_train import UserError
from python_train.metrics.kid import check_subset, resampled_kid, subset_kid
from python_train.metrics.manifold import check_sizes, manifold
from python_train.metrics.moments import FrechetDistance, Gaussian, gaussian_of

Z95 = 1.959963984540054  # of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A metric and the standard deviation that it has over bootstrap resamples (None without)."""

    value: float
    std: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, value ± 1.96 std: resampling moves the Fréchet distance upwards, so that quantiles of the
        resamples need not contain it."""
        return None if self.std is None else (self.value - Z95 * self.std, self.value + Z95 * self.std)


@dataclass(frozen=True)
class ReferenceFeatures:
    """What generated images are compared with: the Gaussian of all reference features, and all or some of the features
    themselves [M,D] (None: unknown, as in the published files, which is enough for the Fréchet distance only)."""

    gaussian: Gaussian
    features: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor) -> ReferenceFeatures:
        """Reference of a few features [M,D] in memory."""
        return cls(gaussian_of(features.cpu()), features.cpu())


def resamples(num: int, replicates: int, seed: int) -> Tensor:
    """How often each of ``num`` images is in each bootstrap resample: float64 [replicates, num]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num, (replicates, num), generator=generator)
    return torch.zeros(replicates, num, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1).double().expand(drawn.shape)
    )


def _estimate(values: Tensor) -> Estimate:
    """The first value, and the spread of the others."""
    spread = float(values[1:].std()) if len(values) > 2 else None
    return Estimate(float(values[0]), spread)


def _weights(num: int, replicates: int, seed: int) -> Tensor:
    """All images once, then the resamples: float64 [1 + replicates, num]."""
    return torch.cat([torch.ones(1, num, dtype=torch.float64), resamples(num, replicates, seed)])


def estimate_kid(generated: Tensor, reference: Tensor, replicates: int = 20, seed: int = 0) -> Estimate:
    """KID of features [N,D] against [M,D] alone, with its spread over resamples of the generated ones."""
    return _estimate(resampled_kid(generated, reference, _weights(len(generated), replicates, seed)))


def measure(
    generated: Tensor,
    reference: ReferenceFeatures,
    replicates: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    kid_subset: int | None = None,
) -> dict[str, Estimate]:
    """Compare generated features [N,D] with a reference: ``fd``, and where it has features ``kid``, ``precision``,
    ``recall``, ``density`` and ``coverage``.

    The estimates' spread is over ``replicates`` resamples of the images over which a metric is an average: of the
    generated ones for fd, kid, precision and density, of the reference for recall and coverage. With ``kid_subset`` KID
    is averaged over 100 random subsets of so many images, as publications do, and its spread is over these. Pairs are
    counted on ``device``. Raises UserError for features that are not finite or do not fit, and for too few images.
    """
    _check(generated, reference)
    check_numbers(len(generated), reference, kid_subset)
    generated = generated.to("cpu", torch.float64)
    weights = _weights(len(generated), replicates, seed)
    distance = FrechetDistance(reference.gaussian)
    distances = [distance(gaussian_of(generated, row)) for row in weights]
    result = {"fd": _estimate(torch.tensor(distances, dtype=torch.float64))}
    if reference.features is None:
        return result
    x, y = generated.to(device), reference.features.to(device)
    if kid_subset is None:
        result["kid"] = _estimate(resampled_kid(x, y, weights))
    else:
        values = torch.tensor(subset_kid(x, y, kid_subset, seed=seed), dtype=torch.float64)
        result["kid"] = Estimate(float(values.mean()), float(values.std()))
    parts = manifold(x, y)
    y_weights = _weights(len(y), replicates, seed + 1)
    for name, rows in (("precision", weights), ("recall", y_weights), ("density", weights), ("coverage", y_weights)):
        result[name] = _estimate(rows @ getattr(parts, name) / rows.sum(dim=1))
    return result


def check_numbers(images: int, reference: ReferenceFeatures, kid_subset: int | None = None) -> None:
    """Raise UserError where `measure` would, given so many generated images: before they are drawn."""
    if images < 2:
        raise UserError(f"metrics need at least 2 images, got {images}")
    if reference.features is None:
        return
    check_sizes(images, len(reference.features))
    if kid_subset is not None:
        check_subset(images, len(reference.features), kid_subset)


def _check(generated: Tensor, reference: ReferenceFeatures) -> None:
    dim = len(reference.gaussian.mu)
    if generated.ndim != 2 or generated.shape[1] != dim:
        raise UserError(f"expected features [images, {dim}], as the reference has, got {list(generated.shape)}")
    if not bool(generated.isfinite().all()):
        bad = int((~generated.isfinite()).any(dim=1).nonzero()[0])
        raise UserError(f"the features of image {bad} are not finite")


def score(generated: Tensor, reference: ReferenceFeatures | Tensor) -> dict[str, float]:
    """The metrics of generated features [N,D] against reference features [M,D] by name, without intervals: see
    `measure`."""
    if isinstance(reference, Tensor):
        reference = ReferenceFeatures.of(reference)
    return {name: estimate.value for name, estimate in measure(generated, reference).items()}
