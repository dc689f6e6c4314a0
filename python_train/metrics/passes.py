"""One pass over images: the features of every kind, their moments, and some of the features themselves.

The images are cut into slices, which the processes do in turn; batches lie within slices, and the slices are added in
their order. So the result is the same, to the last bit, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from python_train import UserError
from python_train.metrics.compare import ReferenceFeatures
from python_train.metrics.extractors import FeatureExtractor
from python_train.metrics.moments import Moments
from python_train.world import World

SLICES = 64
Indices = NDArray[np.int64]
Produce = Callable[[Sequence[Indices]], Iterator[Tensor]]


def random_subset(num: int, count: int, seed: int = 0) -> Indices:
    """``count`` of the indices below ``num``, ascending; all of them if there are no more (spec 7)."""
    order = np.arange(num)
    if count < num:
        np.random.RandomState(seed % 2**31).shuffle(order)
        order = np.sort(order[:count])
    return order


@dataclass(frozen=True)
class _Part:
    """What one slice gives for one kind of features: moments of all its images, features [K,D] of those to be kept."""

    moments: Moments
    kept: Tensor

    @classmethod
    def empty(cls, num: int, num_kept: int, dim: int, device: torch.device) -> _Part:
        """To receive the part of another process."""
        moments = Moments(dim, device)
        moments.num = num
        return cls(moments, torch.empty(num_kept, dim, device=device))

    def from_process(self, source: int, world: World) -> _Part:
        """The part that process ``source`` has."""
        for values in (self.moments.sum, self.moments.outer, self.kept):
            world.broadcast(values, source)
        return self


def _slices(count: int, batch: int) -> list[list[Indices]]:
    """Batches of at most ``batch`` numbers below ``count``, slice by slice."""
    slices = np.array_split(np.arange(count), min(SLICES, -(-count // batch)))
    return [np.array_split(part, -(-len(part) // batch)) for part in slices]


def feature_pass(
    indices: Indices,
    produce: Produce,
    extractors: Sequence[FeatureExtractor],
    *,
    batch: int = 64,
    keep: Indices | None = None,
    world: World | None = None,
    show_progress: bool = False,
) -> dict[str, ReferenceFeatures]:
    """Features of the images ``indices``, each kind under its name; every image is made and embedded once.

    Args:
        indices: which images, ascending.
        produce: yields the images of each of a list of batches of indices, uint8 [N,C,H,W].
        extractors: the kinds of features.
        batch: images at a time in each process.
        keep: the images whose features are kept, among ``indices``. None = all; of none, there are moments only.
        world: the processes that share the work. All of them get the result, on the CPU.
        show_progress: draw a progress bar.

    Raises UserError for features that are not finite, naming the image, and for fewer than two images.
    """
    world = world or World()
    if len(indices) < 2:
        raise UserError(f"metrics need at least 2 images, got {len(indices)}")
    is_kept = np.ones(len(indices), bool) if keep is None else np.isin(indices, keep)
    slices = _slices(len(indices), batch)
    images = produce([indices[rows] for part in slices[world.rank :: world.size] for rows in part])
    totals: list[Moments] = []
    kept: list[list[Tensor]] = [[] for _ in extractors]
    with tqdm(total=len(indices), unit="image", disable=not show_progress) as progress:
        for first in range(0, len(slices), world.size):
            turn = [np.concatenate(part) for part in slices[first : first + world.size]]
            own: list[_Part] = []
            if world.rank < len(turn):
                own = _embed(slices[first + world.rank], indices, is_kept, images, extractors)
            if not totals:  # process 0 always has a slice
                dims = torch.tensor([part.kept.shape[1] for part in own] or [0] * len(extractors), device=world.device)
                totals = [Moments(dim, world.device) for dim in world.broadcast(dims, 0).tolist()]
            for owner, rows in enumerate(turn):
                for column, total in enumerate(totals):
                    mine = own[column] if owner == world.rank else None
                    dim, num_kept = len(total.sum), int(is_kept[rows].sum())
                    part = mine or _Part.empty(len(rows), num_kept, dim, world.device)
                    part.from_process(owner, world)
                    total.merge(part.moments)
                    kept[column].append(part.kept.cpu())
                progress.update(len(rows))
    return {
        extractor.name: ReferenceFeatures(total.gaussian(), torch.cat(parts) if is_kept.any() else None)
        for extractor, total, parts in zip(extractors, totals, kept, strict=True)
    }


def _embed(
    batches: Sequence[Indices],
    indices: Indices,
    is_kept: NDArray[np.bool_],
    images: Iterator[Tensor],
    extractors: Sequence[FeatureExtractor],
) -> list[_Part]:
    """The parts, one for each kind of features, of a slice whose images come next."""
    moments: list[Moments] = []
    kept: list[list[Tensor]] = [[] for _ in extractors]
    for rows in batches:
        stored = next(images)
        for column, extractor in enumerate(extractors):
            features = extractor(stored)
            if not bool(features.isfinite().all()):
                bad = int(indices[rows[int((~features.isfinite()).any(dim=1).nonzero()[0])]])
                raise UserError(f"the features {extractor.name} of image {bad} are not finite")
            if len(moments) == column:
                moments.append(Moments(features.shape[1], features.device))
            moments[column].add(features)
            kept[column].append(features[torch.from_numpy(is_kept[rows]).to(features.device)])
    return [_Part(total, torch.cat(parts)) for total, parts in zip(moments, kept, strict=True)]
