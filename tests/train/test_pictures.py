"""Grids and curves: what is drawn where, and that files are whole."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from python_train.pictures import (
    LINES,
    PAPER,
    SweepPoint,
    image_grid,
    plot_ema_sweep,
    plot_loss,
    read_stats,
    save_png,
    to_pillow,
)


def tiles_of(canvas: Image.Image, value: tuple[int, int, int]) -> int:
    return int((np.asarray(canvas) == value).all(axis=-1).sum())


def test_grid_shows_every_image_enlarged_by_a_whole_factor() -> None:
    rows, columns = 3, 5
    shade = np.arange(1, rows * columns + 1, dtype=np.uint8).reshape(rows, columns, 1, 1, 1) * 7
    images = np.broadcast_to(shade, (rows, columns, 1, 8, 8)).copy()
    canvas = image_grid(images)
    assert all(tiles_of(canvas, (value,) * 3) == 64 * 64 for value in shade.flatten().tolist())
    pixels = np.asarray(canvas)
    for row in range(rows):  # each row from left to right, rows from top to bottom
        y = [np.argwhere((pixels == int(shade[row, column, 0, 0, 0])).all(axis=-1)) for column in range(columns)]
        assert all(a[:, 1].max() < b[:, 1].min() for a, b in pairwise(y))
        assert len({int(a[:, 0].min()) for a in y}) == 1


def test_grid_without_smoothing_keeps_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 3, 8, 8), dtype=np.uint8)
    canvas = np.asarray(image_grid(image))
    corner = np.argwhere((canvas == LINES).all(axis=-1)).min(axis=0) + 2
    tile = canvas[corner[0] : corner[0] + 64, corner[1] : corner[1] + 64]
    assert np.array_equal(tile[3::8, 3::8], image[0, 0].transpose(1, 2, 0))
    smooth = np.asarray(image_grid(image, smooth=True))
    assert smooth.shape == canvas.shape
    assert not np.array_equal(smooth, canvas)


def test_labels_title_and_groups_get_room() -> None:
    images = np.zeros((2, 4, 3, 70, 90), dtype=np.uint8)
    plain = image_grid(images)
    assert plain.height < image_grid(images, title="Title").height
    assert plain.width < image_grid(images, row_labels=["zero", "one"]).width
    grouped = image_grid(images, columns_per_group=2)
    assert grouped.width > plain.width
    middle = np.asarray(grouped)[grouped.height // 2]
    paper = np.flatnonzero((middle == PAPER).all(axis=-1))
    assert any(grouped.width // 3 < x < 2 * grouped.width // 3 for x in paper), "no gap between the groups"
    assert image_grid(images[:, :3], columns_per_group=2).width < grouped.width
    wide_title = image_grid(images[:1, :1], title="a title much wider than the only image")
    assert wide_title.width > image_grid(images[:1, :1]).width


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_channel_count_can_be_saved(channels: int, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (channels, 5, 6), dtype=np.uint8)
    save_png(tmp_path / "image.png", to_pillow(image))
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]
    back = np.asarray(Image.open(tmp_path / "image.png")).reshape(5, 6, channels)
    assert np.array_equal(back, image.transpose(1, 2, 0))
    image_grid(image[None, None])


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[1 to 4,H,W\], got float32 \[1, 2, 2\]"):
        to_pillow(np.zeros((1, 2, 2), dtype=np.float32))
    with pytest.raises(ValueError, match=r"got uint8 \[5, 2, 2\]"):
        to_pillow(np.zeros((5, 2, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match="expected images"):
        image_grid(np.zeros((2, 1, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="3 labels for 2 rows"):
        image_grid(np.zeros((2, 1, 1, 8, 8), dtype=np.uint8), ["a", "b", "c"])


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "image.png"
    with pytest.raises(OSError, match=r"image\.png"):
        save_png(target, to_pillow(np.zeros((1, 2, 2), dtype=np.uint8)))
    assert not list(tmp_path.iterdir())


def test_stats_survive_a_kill_and_a_resume(tmp_path: Path) -> None:
    entries = [{"Progress/kimg": kimg, "Loss/loss": loss} for kimg, loss in ((0, 3), (1, 2), (2, 1), (1, 5), (2, 4))]
    lines = [json.dumps(entry) for entry in entries]
    lines.insert(3, '{"Progress/kimg": 3, "Loss/lo')
    lines.insert(1, json.dumps({"timestamp": 0}))
    path = tmp_path / "stats.jsonl"
    path.write_text("\n".join(lines))
    assert [(entry["Progress/kimg"], entry["Loss/loss"]) for entry in read_stats(path)] == [(0, 3), (1, 5), (2, 4)]


def test_plots_are_whole_pictures(tmp_path: Path) -> None:
    stats = [{"Progress/kimg": float(i), "Loss/loss": 1 / (i + 1), "Loss/learning_rate": 0.01} for i in range(9)]
    stats[0]["Loss/loss"] = float("nan")  # nothing was trained before the first report
    plot_loss(tmp_path / "loss.png", stats)
    plot_loss(tmp_path / "empty.png", [])
    sweep = [SweepPoint(width, -width, 0.9 + width, 100, 20, width**2, 0.001) for width in (0.05, 0.02)]
    plot_ema_sweep(tmp_path / "sweep.png", sweep, 0.05, 0.95, 16.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "loss.png", "sweep.png"]
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 400


def test_accuracy_error_is_binomial() -> None:
    assert SweepPoint(0.1, 0, 0.9, 100, 0, 0, 0).accuracy_error == pytest.approx(0.03)
