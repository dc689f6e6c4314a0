"""Sampling the toy system in all the ways that the paper compares, and the table of figures about them (spec 11.4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from python_train.guidance import Denoiser, Guide
from python_train.sample import sample
from python_train.toy.distribution import TreeMixture
from python_train.toy.model import ToyModel

SIGMA_MAX = 5
LOWEST_LOG_P = -50  # of a single sample in the mean
OUTLINE = 2.12**2  # the outline of a class: where log p is at most so far below its maximum; 99 % of the mass


class Row(NamedTuple):
    """Figures about a set of samples; log p is that of class A without noise."""

    name: str
    inside: float  # fraction inside the outline of class A
    mean_log_p: float
    median_log_p: float
    mean: tuple[float, float]
    std: tuple[float, float]


def exact_denoiser(truth: TreeMixture) -> Denoiser:
    """The denoiser that the exact score gives."""
    return lambda x, sigma, labels=None: x + sigma**2 * truth.score(x, sigma)


def scaled_scores(denoise: Denoiser, factor: float) -> Denoiser:
    """The denoiser whose scores are those of another one, times factor: naive truncation."""
    return lambda x, sigma, labels=None: x + factor * (denoise(x, sigma, labels) - x)


def draw(
    truth: TreeMixture,
    count: int,
    generator: torch.Generator,
    denoise: Denoiser,
    guides: Sequence[Guide] = (),
    num_steps: int = 32,
) -> Tensor:
    """Points [count, 2] by Heun's method, started from p(x; sigma_max) itself."""
    noise = truth.sample(count, SIGMA_MAX, generator) / SIGMA_MAX
    with torch.no_grad():
        return sample(denoise, noise, guides=guides, num_steps=num_steps, sigma_max=SIGMA_MAX)


def draw_all(
    truth: TreeMixture, models: Mapping[str, ToyModel], count: int, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Name and points [count, 2] of each way of sampling, in the order of the table; all start from the same points."""
    main, autoguide, cfg_guide = (models[name].denoise for name in ("main", "autoguide", "cfg-guide"))

    def generator() -> torch.Generator:
        return torch.Generator(truth.means.device).manual_seed(seed)

    yield "direct samples", truth.sample(count, 0, generator())
    for name, denoise, guides in [
        ("exact score", exact_denoiser(truth), []),
        ("no guidance", main, []),
        ("autoguide alone", autoguide, []),
        ("autoguidance w=2", main, [Guide(autoguide, 2)]),
        ("autoguidance w=3", main, [Guide(autoguide, 3)]),
        ("CFG w=4", main, [Guide(cfg_guide, 4)]),
        ("scores × 1.40", scaled_scores(main, 1.40), []),
    ]:
        yield name, draw(truth, count, generator(), denoise, guides)


def outline_level(truth: TreeMixture) -> float:
    """The log p of the outline of a class, whose maximum is at one of the components' means."""
    return float(truth.log_density(truth.means.flatten(0, 1)).max()) - OUTLINE


def measure(name: str, points: Tensor, truth: TreeMixture) -> Row:
    """The figures about points [N, 2]."""
    log_p = truth.log_density(points)
    return Row(
        name,
        float((log_p >= outline_level(truth)).float().mean()),
        float(log_p.clamp(min=LOWEST_LOG_P).mean()),
        float(log_p.median()),
        tuple(points.mean(0).tolist()),
        tuple(points.std(0).tolist()),
    )


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| samples | inside outline | mean log p | median log p | mean | std |", "|---|---|---|---|---|---|"]
    for row in rows:
        mean, std = (f"({x:.3f}, {y:.3f})" for x, y in (row.mean, row.std))
        lines.append(
            f"| {row.name} | {row.inside:.3f} | {row.mean_log_p:.2f} | {row.median_log_p:.2f} | {mean} | {std} |"
        )
    return "\n".join(lines)
