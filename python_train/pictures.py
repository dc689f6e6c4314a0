"""Pictures of a run: labelled image grids (Pillow) and curves (matplotlib), each written atomically as PNG."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from python_train.checkpoint import atomic_write

MIN_TILE = 64  # pixels; images smaller than this are enlarged by a whole factor so that they can be seen
INK, PAPER, LINES = (32, 32, 32), (255, 255, 255), (90, 110, 150)  # lines unlike black, white or skin: tiles stay apart
BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#718096"


def save_png(path: Path, image: Image.Image) -> None:
    """Write a Pillow image to path atomically; OSError if the disk refuses."""
    with atomic_write(path) as temp:
        image.save(temp, format="PNG")


def to_pillow(image: np.ndarray) -> Image.Image:
    """Pillow image of a uint8 array [C,H,W]: grey, grey + alpha, RGB or RGBA for C = 1 to 4; ValueError otherwise."""
    if image.dtype != np.uint8 or image.ndim != 3 or not 1 <= image.shape[0] <= 4:
        raise ValueError(f"to_pillow: expected uint8 [1 to 4,H,W], got {image.dtype} {list(image.shape)}")
    return Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0))


def image_grid(
    images: np.ndarray,
    row_labels: Sequence[str] = (),
    title: str = "",
    columns_per_group: int | None = None,
    smooth: bool = False,
) -> Image.Image:
    """Draw images as a table with a label at the left of each row.

    Args:
        images: uint8 [rows, columns, C, H, W], C = 1 to 4; small ones are enlarged by a whole factor.
        row_labels: one per row, or none.
        title: a line above the table.
        columns_per_group: leave a wider gap after every so many columns.
        smooth: enlarge with bicubic interpolation, which the eye reads more easily, instead of showing pixels.

    Raises ValueError if shapes, dtype or the number of labels do not fit.
    """
    if images.ndim != 5 or 0 in images.shape:
        raise ValueError(f"image_grid: expected images [rows,columns,C,H,W], got {list(images.shape)}")
    rows, columns, _, height, width = images.shape
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"image_grid: {len(row_labels)} labels for {rows} rows")
    scale = max(1, -(-MIN_TILE // min(height, width)))
    tile_width, tile_height = width * scale, height * scale
    line, margin = max(2, tile_width // 32), 12
    group = columns_per_group or columns
    group_width = group * (tile_width + line) + line
    font = ImageFont.load_default(size=max(14, min(24, tile_height // 3)))
    label_width = max((int(font.getlength(label)) + margin for label in row_labels), default=0)
    left, top = margin + label_width, margin + (2 * int(font.size) if title else 0)
    groups = -(-columns // group)
    last_width = (columns - (groups - 1) * group) * (tile_width + line) + line
    right = left + (groups - 1) * (group_width + margin) + last_width
    bottom = top + rows * (tile_height + line) + line

    resampling = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    canvas = Image.new("RGB", (max(right, margin + int(font.getlength(title))) + margin, bottom + margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, (top + margin // 2) // 2), title, INK, font, anchor="lm")
    for first in range(0, columns, group):
        group_left = left + first // group * (group_width + margin)
        members = range(first, min(first + group, columns))
        draw.rectangle((group_left, top, group_left + len(members) * (tile_width + line) + line - 1, bottom - 1), LINES)
        for row in range(rows):
            for column in members:
                tile = to_pillow(images[row, column]).resize((tile_width, tile_height), resampling)
                x = group_left + line + (column - first) * (tile_width + line)
                canvas.paste(tile, (x, top + line + row * (tile_height + line)))
    for row, label in enumerate(row_labels):
        y = top + line + row * (tile_height + line) + tile_height // 2
        draw.text((left - margin // 2, y), label, INK, font, anchor="rm")
    return canvas


def read_stats(path: Path) -> list[dict[str, float]]:
    """Entries of a stats.jsonl file in order of training progress.

    After a resume the same point may occur twice (the later entry counts), and a killed run may leave half a line
    (which is left out). Raises OSError if the file cannot be read.
    """
    entries = [entry for line in path.read_text().splitlines() if (entry := _parse_line(line)) is not None]
    latest = {entry["Progress/kimg"]: entry for entry in entries}
    return [latest[kimg] for kimg in sorted(latest)]


def _parse_line(line: str) -> dict[str, float] | None:
    """The numbers of an entry; None if it is none, or does not tell its place."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = entry.items() if isinstance(entry, dict) else ()
    numbers = {key: value for key, value in known if isinstance(value, float) or type(value) is int}
    numbers = {key: value for key, value in numbers.items() if not abs(value) > sys.float_info.max}
    return numbers if math.isfinite(numbers.get("Progress/kimg", math.nan)) else None


def _new_figure(title: str, panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(7, 1 + 2.3 * panels), dpi=110, layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for ax in axes:
        ax.grid(True, color="#e2e8f0")
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(path: Path, figure: Figure) -> None:
    """Write a matplotlib figure to path as PNG, atomically."""
    with atomic_write(path) as temp:
        figure.savefig(temp, format="png")


def plot_loss(path: Path, stats: Sequence[dict[str, float]], title: str = "Training") -> None:
    """Plot loss and learning rate against images seen, from the entries of stats.jsonl."""
    points = [entry for entry in stats if np.isfinite(entry.get("Loss/loss", np.nan))]
    kimg = [entry["Progress/kimg"] for entry in points]
    figure, (loss_ax, rate_ax) = _new_figure(title, 2)
    loss_ax.plot(kimg, [entry["Loss/loss"] for entry in points], ".-", color=BLUE)
    loss_ax.set_ylabel("loss (mean per pixel)")
    rate_ax.plot(kimg, [entry.get("Loss/learning_rate", np.nan) for entry in points], ".-", color=ORANGE)
    rate_ax.set_ylabel("learning rate")
    rate_ax.set_ylim(bottom=0)
    rate_ax.set_xlabel("images seen (thousands)")
    save_figure(path, figure)


@dataclass(frozen=True)
class SweepPoint:
    """What one post-hoc EMA length gives."""

    sigma_rel: float
    loss: float  # training loss with these weights, on the training images
    accuracy: float  # of a classifier on generated images, 0..1
    images: int  # that were generated for it
    nearest: float  # median distance of a generated image to the nearest training image
    kid: float  # kernel distance of the generated images to the training images, by whitened principal components
    kid_error: float  # its standard error

    @property
    def accuracy_error(self) -> float:
        """Standard error of the accuracy: a difference smaller than this says nothing."""
        return float(np.sqrt(self.accuracy * (1 - self.accuracy) / self.images))


def plot_ema_sweep(
    path: Path,
    sweep: Sequence[SweepPoint],
    chosen: float,
    needed_accuracy: float,
    real_nearest: float,
    title: str = "EMA length, chosen after training",
) -> None:
    """Plot loss, KID and accuracy with their standard errors, and nearest-neighbour distance against the EMA length
    sigma_rel."""
    points = sorted(sweep, key=lambda point: point.sigma_rel)
    sigma_rel = [point.sigma_rel for point in points]
    figure, (loss_ax, kid_ax, accuracy_ax, nearest_ax) = _new_figure(title, 4)
    for ax in (loss_ax, kid_ax, accuracy_ax, nearest_ax):
        ax.axvline(chosen, color=ORANGE, linewidth=1, label=f"chosen: {chosen:g}" if ax is loss_ax else None)
    loss_ax.plot(sigma_rel, [point.loss for point in points], "o-", color=BLUE)
    loss_ax.set_ylabel("loss on training images\n(mean per pixel)")
    label = f"{points[0].images} images each, ± standard error"
    kid, kid_errors = 1000 * np.array([[point.kid, point.kid_error] for point in points]).T
    kid_ax.errorbar(sigma_rel, kid, kid_errors, fmt="o-", color=BLUE, capsize=3, label=label)
    kid_ax.axhline(0, color=GREY, linestyle="--", label="no difference from real ones")
    kid_ax.set_ylabel("KID of principal\ncomponents × 1000")
    accuracy = np.array([100 * point.accuracy for point in points])
    errors = np.array([100 * point.accuracy_error for point in points])
    accuracy_ax.errorbar(sigma_rel, accuracy, errors, fmt="o-", color=BLUE, capsize=3, label=label)
    accuracy_ax.axhline(100 * needed_accuracy, color=GREY, linestyle="--", label=f"needed: {100 * needed_accuracy:g} %")
    accuracy_ax.set_ylim(min(90, (accuracy - errors).min() - 3), 100.5)
    accuracy_ax.set_ylabel("generated images taken\nfor their class (%)")
    nearest_ax.plot(sigma_rel, [point.nearest for point in points], "o-", color=BLUE, label="generated to real")
    nearest_ax.axhline(real_nearest, color=GREY, linestyle="--", label="real to other real")
    nearest_ax.set_ylim(0, 1.3 * max(real_nearest, *(point.nearest for point in points)))
    nearest_ax.set_ylabel("median distance to nearest\nreal image (pixels 0..16)")
    nearest_ax.set_xlabel("EMA length σ_rel (width of the averaging profile / training time)")
    for ax in (loss_ax, kid_ax, accuracy_ax, nearest_ax):
        ax.legend(frameon=False)
    save_figure(path, figure)
