"""The metrics on features: formulae, other libraries' values, intervals, and one pass over the images."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metrics_peers import GOLDEN, features
from torch import Tensor

from python_train import UserError
from python_train.metrics import ReferenceFeatures, feature_extractor, measure, score
from python_train.metrics.compare import resamples
from python_train.metrics.extractors import FeatureExtractor
from python_train.metrics.kid import kid, resampled_kid, subset_kid
from python_train.metrics.manifold import manifold
from python_train.metrics.moments import FrechetDistance, Gaussian, Moments, gaussian_of
from python_train.metrics.passes import SLICES, Indices, feature_pass, random_subset
from python_train.world import World

PEERS = json.loads(GOLDEN.read_text())


def generated() -> Tensor:
    return torch.from_numpy(features("generated"))


def reference() -> Tensor:
    return torch.from_numpy(features("reference"))


@pytest.mark.parametrize("metric", ["fd", "kid", "precision", "recall", "density", "coverage"])
def test_other_libraries_say_the_same(metric: str) -> None:
    ours = score(generated(), reference())[metric]
    for peer, value in PEERS[metric].items():
        assert ours == pytest.approx(value, rel=1e-6), peer


# ----------------------------------------------------------------------------------------------------- Fréchet distance


def test_frechet_distance_of_known_gaussians() -> None:
    a = Gaussian(9, torch.tensor([1.0, 0, 2]).double(), torch.diag(torch.tensor([4.0, 9, 0])).double())
    b = Gaussian(9, torch.tensor([0.0, 0, 0]).double(), torch.diag(torch.tensor([1.0, 16, 1])).double())
    assert FrechetDistance(a)(b) == pytest.approx(5 + (2 - 1) ** 2 + (3 - 4) ** 2 + (0 - 1) ** 2, abs=1e-12)
    assert FrechetDistance(a)(a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_is_the_specs_with_its_matrix_root() -> None:
    """‖μ₁−μ₂‖² + Tr(Σ₁ + Σ₂ − 2 sqrtm(Σ₁Σ₂)) by SciPy's root of the product, which is not symmetric."""
    a, b = gaussian_of(generated()), gaussian_of(reference())
    root = scipy.linalg.sqrtm(a.sigma.numpy() @ b.sigma.numpy()).real
    expected = (a.mu - b.mu).square().sum() + (a.sigma + b.sigma).trace() - 2 * np.trace(root)
    assert FrechetDistance(a)(b) == pytest.approx(float(expected), rel=1e-10)
    assert FrechetDistance(b)(a) == pytest.approx(float(expected), rel=1e-10)


def test_frechet_distance_of_fewer_images_than_features() -> None:
    x, y = torch.randn(7, 20).double(), 2 + torch.randn(9, 20).double()
    distance = FrechetDistance(gaussian_of(x))(gaussian_of(y))
    a, b = (rows - rows.mean(dim=0) for rows in (x, y))
    overlap = torch.linalg.svdvals(a @ b.T / np.sqrt((len(a) - 1) * (len(b) - 1))).sum()
    variances = a.square().sum() / (len(a) - 1) + b.square().sum() / (len(b) - 1)
    expected = (x.mean(dim=0) - y.mean(dim=0)).square().sum() + variances - 2 * overlap
    assert distance == pytest.approx(float(expected), rel=1e-6)


def test_moments_stream() -> None:
    x = features("generated").astype(np.float32)
    parts = [Moments(x.shape[1]), Moments(x.shape[1])]
    for start in range(0, len(x), 33):
        parts[start // 33 % 2].add(torch.from_numpy(x[start : start + 33]))
    parts[0].merge(parts[1])
    found = parts[0].gaussian()
    assert found.num == len(x)
    for gaussian in (found, gaussian_of(torch.from_numpy(x))):
        np.testing.assert_allclose(gaussian.mu, x.astype(np.float64).mean(axis=0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(gaussian.sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------------ KID


def test_resamples_count_no_image_against_itself() -> None:
    x, y = generated()[:9], reference()[:8]
    weights = torch.tensor([[0, 2, 1, 0, 3, 1, 1, 1, 0.0]]).double()
    rows = weights[0].long().repeat_interleave(weights[0].long())
    copies = torch.arange(9).repeat_interleave(weights[0].long())
    kernel = lambda a, b: (a @ b.T / x.shape[1] + 1) ** 3  # noqa: E731
    assert len(rows) == len(copies)
    drawn = x[copies]
    pairs = copies[:, None] != copies
    expected = kernel(drawn, drawn)[pairs].mean()
    expected += kernel(y, y)[~torch.eye(8, dtype=torch.bool)].mean() - 2 * kernel(drawn, y).mean()
    torch.testing.assert_close(resampled_kid(x, y, weights)[0], expected, rtol=1e-12, atol=0)


def test_kid_has_no_bias() -> None:
    """Of small sets of one distribution it is 0 in the mean, and of small sets of two what it is of large ones."""
    same = [kid(torch.randn(12, 3), torch.randn(12, 3)) for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0
    shifted = subset_kid(torch.randn(3000, 3) + 0.5, torch.randn(3000, 3), 15, subsets=400)
    large = kid(torch.randn(3000, 3) + 0.5, torch.randn(3000, 3))
    assert abs(np.mean(shifted) - large) < 4 * np.std(shifted) / np.sqrt(len(shifted)) + 0.1 * large


def test_kid_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kid(generated(), reference())
    monkeypatch.setattr("python_train.metrics.kid.ROWS", 37)
    assert kid(generated(), reference()) == pytest.approx(whole, rel=1e-12)


# --------------------------------------------------------------------------------------- precision, recall and the rest


def test_manifold_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = generated()[:70], reference()[:60]
    for rows in (1024, 16):
        monkeypatch.setattr("python_train.metrics.manifold.ROWS", rows)
        found = manifold(x, y)
        between = torch.cdist(x, y)

        def radii(points: Tensor, k: int) -> Tensor:
            return torch.cdist(points, points).sort(dim=1).values[:, k]

        torch.testing.assert_close(found.precision, (between <= radii(y, 3)).any(dim=1).double())
        torch.testing.assert_close(found.recall, (between <= radii(x, 3)[:, None]).any(dim=0).double())
        torch.testing.assert_close(found.density, (between < radii(y, 5)).sum(dim=1).double() / 5)
        torch.testing.assert_close(found.coverage, (between < radii(y, 5)).any(dim=0).double())


def test_precision_and_recall_tell_quality_from_diversity() -> None:
    real = torch.randn(500, 2)
    narrow = score(real[real.norm(dim=1) < 0.7][:100] + 0.01, real)
    noisy = score(real[:400] * 4, real)
    assert narrow["precision"] == 1
    assert narrow["recall"] < 0.5
    assert noisy["precision"] < 0.6
    assert noisy["coverage"] < narrow["precision"]


# ------------------------------------------------------------------------------------------------------------ intervals


def test_the_spread_is_that_of_repeated_experiments() -> None:
    """Bootstrap of one set of images against the spread over many such sets."""
    real = torch.randn(400, 4)
    target = ReferenceFeatures.of(real)
    repeated = [score(torch.randn(150, 4) * 1.2 + 0.3, target) for _ in range(60)]
    estimates = measure(torch.randn(150, 4) * 1.2 + 0.3, target, replicates=100)
    for name in ("fd", "kid", "precision", "density"):
        spread = np.std([values[name] for values in repeated])
        assert estimates[name].std == pytest.approx(spread, rel=0.5), name
        low, high = estimates[name].interval or (0, 0)
        assert low < estimates[name].value < high
        assert high - low == pytest.approx(2 * 1.96 * estimates[name].std, rel=1e-3)
    p = estimates["recall"].value
    assert estimates["recall"].std == pytest.approx(np.sqrt(p * (1 - p) / 400), rel=0.3)


def test_no_replicates_no_interval() -> None:
    estimates = measure(generated(), ReferenceFeatures.of(reference()))
    assert all(estimate.std is None and estimate.interval is None for estimate in estimates.values())
    assert {name: estimate.value for name, estimate in estimates.items()} == score(generated(), reference())


def test_statistics_alone_give_the_frechet_distance() -> None:
    assert list(score(generated(), ReferenceFeatures(gaussian_of(reference())))) == ["fd"]


def test_resamples_draw_with_replacement() -> None:
    drawn = resamples(50, 200, seed=1)
    assert bool((drawn.sum(dim=1) == 50).all())
    assert float((drawn == 0).double().mean()) == pytest.approx((1 - 1 / 50) ** 50, abs=0.02)
    assert torch.equal(drawn, resamples(50, 200, seed=1))


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_name_what_is_wrong() -> None:
    x = torch.randn(20, 4)
    bad = x.clone()
    bad[13, 2] = torch.nan
    for features_, other, words in [
        (torch.randn(20, 5), x, r"expected features \[images, 4\]"),
        (x[:1], x, "at least 2 images, got 1"),
        (bad, x, "features of image 13 are not finite"),
        (x[:5], x, "5 generated images are too few"),
        (x, x[:4], "4 reference images are too few"),
    ]:
        with pytest.raises(UserError, match=words):
            score(features_, other)
    with pytest.raises(UserError, match="KID of subsets of 30 images: there are only 20 generated"):
        subset_kid(x, torch.randn(40, 4), 30)
    with pytest.raises(UserError, match="features of 5 numbers cannot be compared with 4"):
        FrechetDistance(gaussian_of(x))(gaussian_of(torch.randn(9, 5)))


# ------------------------------------------------------------------------------------------------------------- one pass


def drawn(batches: Sequence[Indices]) -> Iterator[Tensor]:
    for batch in batches:
        yield torch.stack(
            [
                torch.randint(256, (1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(int(i)))
                for i in batch
            ]
        )


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 300), batch=st.integers(1, 50), kept=st.integers(0, 300))
def test_a_pass_sees_each_image_once_in_order(num: int, batch: int, kept: int) -> None:
    asked: list[int] = []

    def produce(batches: Sequence[Indices]) -> Iterator[Tensor]:
        asked.extend(int(index) for rows in batches for index in rows)
        assert max(map(len, batches)) <= batch
        return drawn(batches)

    indices, keep = random_subset(500, num, seed=7), random_subset(500, kept, seed=3)
    extract = feature_extractor("pixels")
    (found,) = feature_pass(indices, produce, [extract], batch=batch, keep=keep).values()
    assert asked == indices.tolist()
    everything = extract(next(drawn([indices])))
    expected = gaussian_of(everything)
    torch.testing.assert_close(found.gaussian.mu, expected.mu, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.gaussian.sigma, expected.sigma, rtol=1e-9, atol=1e-12)
    expected_kept = everything[torch.from_numpy(np.isin(indices, keep))]
    assert torch.equal(found.features, expected_kept) if len(expected_kept) else found.features is None


class Threads:
    """Processes of a data-parallel run, played by threads."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.shared = size, threading.Barrier(size), torch.empty(0)

    def run(self, work: Callable[[World], Any]) -> list[Any]:
        def member(rank: int) -> Any:
            try:
                return work(Member(rank, self.size, group=self))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(member, range(self.size)))


@dataclass(frozen=True)
class Member(World):
    group: Threads | None = None

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        assert self.group is not None
        if self.rank == source:
            self.group.shared = values
        self.group.barrier.wait()
        assert values.shape == self.group.shared.shape
        assert values.dtype == self.group.shared.dtype
        values.copy_(self.group.shared.clone())
        self.group.barrier.wait()
        return values


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num", [5, 150])
def test_the_result_is_the_same_for_any_number_of_processes(num: int, size: int) -> None:
    def work(world: World) -> ReferenceFeatures:
        keep = random_subset(num, 100, seed=3)
        return feature_pass(np.arange(num), drawn, [feature_extractor("pixels")], batch=4, keep=keep, world=world)[
            "pixels"
        ]

    alone = work(World())
    for found in Threads(size).run(work):
        assert torch.equal(found.gaussian.mu, alone.gaussian.mu)
        assert torch.equal(found.gaussian.sigma, alone.gaussian.sigma)
        assert found.gaussian.num == alone.gaussian.num == num
        assert torch.equal(found.features, alone.features)


PROCESS = """
import sys
import numpy as np, torch
from python_train.metrics import feature_extractor
from python_train.metrics.passes import feature_pass
from python_train.world import World

def drawn(batches):
    for batch in batches:
        yield torch.from_numpy(np.stack([np.random.RandomState(i).randint(256, size=(1, 4, 4)) for i in batch])).byte()

rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
found = feature_pass(np.arange(50), drawn, [feature_extractor("pixels")], batch=4, world=World(rank, size))["pixels"]
torch.distributed.destroy_process_group()
torch.save((found.gaussian.mu, found.gaussian.sigma, found.features), f"{folder}/{rank}-of-{size}.pt")
"""


def test_two_real_processes_give_what_one_gives(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), "2", str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]

    def numbers(batches: Sequence[Indices]) -> Iterator[Tensor]:
        for batch in batches:
            rows = [np.random.RandomState(i).randint(256, size=(1, 4, 4)) for i in batch]
            yield torch.from_numpy(np.stack(rows)).byte()

    alone = feature_pass(np.arange(50), numbers, [feature_extractor("pixels")], batch=4)["pixels"]
    for rank in range(2):
        mu, sigma, features_ = torch.load(tmp_path / f"{rank}-of-2.pt")
        assert torch.equal(mu, alone.gaussian.mu)
        assert torch.equal(sigma, alone.gaussian.sigma)
        assert torch.equal(features_, alone.features)


def test_several_kinds_from_one_pass() -> None:
    calls = []

    def embed(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.flatten(1)[:, :3].float() / 9

    other = FeatureExtractor("efflite0", "x", torch.device("cpu"), embed)
    found = feature_pass(np.arange(90), drawn, [feature_extractor("pixels"), other], batch=8)
    assert {name: len(features.gaussian.mu) for name, features in found.items()} == {"pixels": 16, "efflite0": 3}
    assert sum(calls) == 90
    assert len(calls) < SLICES


def test_a_pass_names_the_image_with_bad_features() -> None:
    def embed(images: Tensor) -> Tensor:
        values = images.flatten(1).float()
        return torch.where(values[:, :1] == expected[57, :1], torch.inf, values)

    expected = next(drawn([np.arange(100)])).flatten(1).float()
    first = int((expected[:, 0] == expected[57, 0]).nonzero()[0])
    extract = FeatureExtractor("pixels", "x", torch.device("cpu"), embed)
    with pytest.raises(UserError, match=f"features pixels of image {first} are not finite"):
        feature_pass(np.arange(100), drawn, [extract], batch=16)
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        feature_pass(np.arange(1), drawn, [extract])


def test_random_subset_is_the_specs() -> None:
    order = np.arange(10)
    np.random.RandomState(5).shuffle(order)
    assert random_subset(10, 4, seed=5 + 2**31).tolist() == sorted(order[:4].tolist())
    assert random_subset(10, 10, seed=5).tolist() == random_subset(10, 99).tolist() == list(range(10))
