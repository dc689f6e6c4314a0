"""The figure of the toy system: samples of each method over the classes' outlines, and what guidance follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from python_train.pictures import BLUE, GREY, ORANGE, save_figure
from python_train.toy.distribution import TreeMixture
from python_train.toy.evaluate import outline_level
from python_train.toy.model import ToyModel

CENTRE, HALF_SIZE = (0.30, 0.30), 1.2
CLOSE_CENTRE, CLOSE_HALF_SIZE, SIGMA_MID, ARROW_DISTANCE = (0.45, 1.22), 0.3, 0.03, 0.045
PANELS = {  # the names of evaluate.draw_all
    "direct samples": "ground truth",
    "no guidance": "no guidance",
    "CFG w=4": "classifier-free guidance, w = 4",
    "scores × 1.40": "naive truncation, scores × 1.40",
    "autoguidance w=3": "autoguidance, w = 3",
}


def grid_points(centre: tuple[float, float], half_size: float, pixels: int) -> Tensor:
    """Points [pixels * pixels, 2] of a square view, row by row from below."""
    axes = [torch.linspace(c - half_size, c + half_size, pixels) for c in centre]
    x, y = torch.meshgrid(*axes, indexing="xy")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def thinned(points: np.ndarray, distance: float) -> np.ndarray:
    """Those of the points [N, 2], in order, that are at least so far from all that were taken before."""
    taken = np.empty((0, 2))
    for point in points:
        if not len(taken) or np.linalg.norm(taken - point, axis=1).min() >= distance:
            taken = np.vstack([taken, point])
    return taken


def _view(ax: Axes, centre: tuple[float, float], half_size: float, title: str) -> None:
    ax.set(xlim=(centre[0] - half_size, centre[0] + half_size), ylim=(centre[1] - half_size, centre[1] + half_size))
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize=10)


def _draw_outlines(axes: Iterable[Axes], pixels: int) -> None:
    """Both classes in the full view: A in orange, B in grey."""
    points = grid_points(CENTRE, HALF_SIZE, pixels)
    x, y = (points[:, axis].reshape(pixels, pixels).numpy() for axis in (0, 1))
    classes = [(TreeMixture("B"), GREY), (TreeMixture("A"), ORANGE)]
    maps = [(t.log_density(points).reshape(pixels, pixels).numpy(), outline_level(t), colour) for t, colour in classes]
    for ax in axes:
        for log_p, level, colour in maps:
            ax.contourf(x, y, log_p, levels=[level, np.inf], colors=[colour], alpha=0.25)
            ax.contour(x, y, log_p, levels=[level], colors=[colour], linewidths=0.5)


def _image(ax: Axes, values: Tensor, **style: object) -> None:
    pixels = round(len(values) ** 0.5)
    (x, y), half = CLOSE_CENTRE, CLOSE_HALF_SIZE
    extent = (x - half, x + half, y - half, y + half)
    ax.imshow(values.reshape(pixels, pixels).numpy(), origin="lower", extent=extent, interpolation="bilinear", **style)


def draw_figure(path: Path, samples: Mapping[str, Tensor], models: Mapping[str, ToyModel], pixels: int = 300) -> None:
    """Write the figure as PNG, atomically.

    Above: ``samples``, points [N, 2] by the names of `PANELS`, over the outlines of class A (orange) and B (grey).
    Below, in a close-up at noise level `SIGMA_MID`: the densities of class A, of the main model and of its autoguide,
    and the differences G_main - G_guide whose gradient the two kinds of guidance add.
    """
    figure = Figure(figsize=(20, 8.6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, len(PANELS))
    _draw_outlines(above, pixels)
    for ax, (name, title) in zip(above, PANELS.items(), strict=True):
        ax.scatter(*samples[name].T.numpy(), s=0.6, color=BLUE, linewidths=0, rasterized=True)
        _view(ax, CENTRE, HALF_SIZE, title)

    truth, sigma = TreeMixture("A"), torch.tensor(SIGMA_MID)
    grid = grid_points(CLOSE_CENTRE, CLOSE_HALF_SIZE, pixels // 2)
    with torch.no_grad():
        G = {name: model(grid, sigma) for name, model in models.items()}
    for ax, log_p, title in [
        (below[0], truth.log_density(grid, sigma), f"p(x; σ = {SIGMA_MID:g}) of class A"),
        (below[1], G["main"], "main model"),
        (below[2], G["autoguide"], "autoguide"),
    ]:
        _image(ax, (log_p - log_p.max()).exp(), cmap="Oranges")
        _view(ax, CLOSE_CENTRE, CLOSE_HALF_SIZE, title)

    noisy = truth.sample(20_000, SIGMA_MID, torch.Generator().manual_seed(0))
    inside = (noisy - torch.tensor(CLOSE_CENTRE)).abs().amax(1) < CLOSE_HALF_SIZE
    starts = torch.from_numpy(thinned(noisy[inside].numpy(), ARROW_DISTANCE)).float()
    for ax, guide, title in [(below[3], "cfg-guide", "CFG guide"), (below[4], "autoguide", "autoguide")]:
        difference = G["main"] - G[guide]
        middle = difference.median()
        span = float((difference - middle).abs().quantile(0.95))
        _image(ax, difference - middle, cmap="PuOr_r", vmin=-span, vmax=span)
        arrows = (models["main"].score(starts, sigma) - models[guide].score(starts, sigma)).T.numpy()
        ax.quiver(*starts.T.numpy(), *arrows, width=0.004)
        _view(ax, CLOSE_CENTRE, CLOSE_HALF_SIZE, f"log p_main / p_guide and its gradient: {title}")
    save_figure(path, figure)
