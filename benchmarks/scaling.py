"""How the training step scales with batch, resolution and model size: a CSV file and a plot.

python -m benchmarks.scaling predicted [--gpu H200] [--outdir DIR]     from the analytic model of `python_train.plan`
python -m benchmarks.scaling measured [--outdir DIR]                   small networks on this CPU, one thread

Predictions are of a GPU that was not there: see `python_train.plan` for what they assume. Measurements are of processor
time, so that other programs on the machine count little.
"""

from __future__ import annotations

import csv
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import click
import matplotlib as mpl
import torch

mpl.use("agg")
import matplotlib.pyplot as plt

from benchmarks.step_cases import BENCHMARK_16, network
from python_train import plan
from python_train.config import TrainOptions, make_options
from python_train.data import PixelEncoder
from python_train.network import Precond
from python_train.trainer import Trainer


class Point(NamedTuple):
    """One network and batch; `axis` says along which of batch, resolution and size it lies."""

    axis: str
    network: str
    resolution: int
    batch: int
    options: TrainOptions


def _at(options: TrainOptions, batch: int) -> TrainOptions:
    return replace(options, batch=batch, batch_gpu=batch, duration=batch)


def published() -> Iterator[Point]:
    """EDM2-S at other batches and resolutions of latents, and all sizes; batch 32, XXL 16."""
    small = make_options("img512-s")
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        yield Point("batch", "img512-s", 64, batch, _at(small, batch))
    for resolution in (16, 32, 64, 128):
        yield Point("resolution", "img512-s", resolution, 32, _at(small, 32))
    for size in ("xxs", "xs", "s", "m", "l", "xl", "xxl"):
        batch = 16 if size == "xxl" else 32
        yield Point("size", f"img512-{size}", 64, batch, _at(make_options(f"img512-{size}"), batch))


def small() -> Iterator[Point]:
    """The benchmark's network of 3.4 M parameters at other batches, resolutions and widths."""
    for batch in (1, 4, 16, 64):
        yield Point("batch", "32 channels", 16, batch, _at(BENCHMARK_16, batch))
    for resolution in (8, 16, 32):
        yield Point("resolution", "32 channels", resolution, 16, _at(BENCHMARK_16, 16))
    for channels in (16, 32, 64):
        options = replace(BENCHMARK_16, model_channels=channels)
        yield Point("size", f"{channels} channels", 16, 16, _at(options, 16))


def predict(point: Point, gpu: plan.GPU) -> dict[str, object]:
    shape = point.resolution, 4, 1000
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Precond(**point.options.network_config(*shape)).parameters())
    found = plan.predict(point.options, gpu, 1, *shape, parameters)
    return {
        "images/s": f"{found.images_per_second:.4g}",
        "parameters": parameters,
        "GFLOP an image": f"{found.flops_per_image / 1e9:.4g}",
        "GB an image": f"{found.bytes_per_image / 1e9:.4g}",
        "launches": found.launches,
        "MFU": f"{found.mfu:.3f}",
        "memory GiB": f"{found.peak_memory / 2**30:.3g}",
    }


def measure(point: Point, steps: int = 3) -> dict[str, object]:
    """Median over steps after a first one."""
    options = point.options
    trainer = Trainer(network(options, point.resolution, 3), options, PixelEncoder())
    images = torch.randint(256, [options.batch, 3, point.resolution, point.resolution], dtype=torch.uint8)
    stream = itertools.repeat((images, torch.eye(10)[torch.arange(options.batch) % 10]))
    seconds = []
    for _ in range(1 + steps):
        start = time.process_time()
        trainer.step(stream)
        seconds.append(time.process_time() - start)
    return {
        "images/s": f"{options.batch / statistics.median(seconds[1:]):.4g}",
        "parameters": sum(param.numel() for param in trainer.params),
    }


def write(rows: list[dict[str, object]], file: Path) -> None:
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: list[dict[str, object]], title: str, file: Path) -> None:
    """Images per second along each axis, logarithmic."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for panel, (axis, of) in zip(
        panels, {"batch": "batch", "resolution": "resolution", "size": "parameters"}.items(), strict=True
    ):
        points = [row for row in rows if row["axis"] == axis]
        panel.plot([row[of] for row in points], [float(str(row["images/s"])) for row in points], "o-")
        panel.set(xscale="log", yscale="log", xlabel=of)
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("images/s")
    figure.suptitle(title)
    figure.savefig(file, dpi=100)
    plt.close(figure)


@click.command(help=__doc__)
@click.argument("kind", type=click.Choice(["predicted", "measured"]))
@click.option("--gpu", type=click.Choice(list(plan.GPUS)), default="H200", show_default=True)
@click.option(
    "--axis", "axes", type=click.Choice(["batch", "resolution", "size"]), multiple=True, help="[default: all]"
)
@click.option("--outdir", type=click.Path(file_okay=False, path_type=Path), default=Path("benchmarks/results"))
def main(kind: str, gpu: str, axes: tuple[str, ...], outdir: Path) -> None:
    torch.set_num_threads(1)
    rows = []
    for point in published() if kind == "predicted" else small():
        if axes and point.axis not in axes:
            continue
        found = predict(point, plan.GPUS[gpu]) if kind == "predicted" else measure(point)
        row = {"kind": kind, "axis": point.axis, "network": point.network, "resolution": point.resolution}
        rows.append({**row, "batch": point.batch, **found})
        print(rows[-1], flush=True)
    name = f"scaling-{kind}-{time.strftime('%Y-%m-%d')}"
    outdir.mkdir(parents=True, exist_ok=True)
    write(rows, outdir / f"{name}.csv")
    about = (
        f"{gpu}, PREDICTED, not measured" if kind == "predicted" else "measured on a CPU, one thread, processor time"
    )
    draw(rows, f"Training step: {about}", outdir / f"{name}.png")


if __name__ == "__main__":
    main()
