"""Training steps and sampling of EDM2 presets on the GPU at hand: images/s, MFU, peak memory, launches.

python -m benchmarks.gpu_step [--preset img512-s ...] [--batch 32 ...] [--sampling] [--json FILE] [--dry-run]

A training step is that of `python_train.trainer` on random latents, its whole batch at once, launch by launch and
replayed from a CUDA graph. Sampling is Heun's method
with 32 noise levels (63 evaluations) guided by the XS network. Times are medians of CUDA events around one step or one
batch; MFU counts 2 flops a multiply-add against the data sheet; launches are the kernels that the profiler saw, beside
those that `benchmarks/traffic.py` counts. What does not fit into memory is a row that says so. --dry-run takes a tiny
network on the CPU, untimed.
"""

import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.step_cases import network
from benchmarks.traffic import _RESOLUTION_CHANNELS_LABELS, count_step
from python_train import graph, plan
from python_train.config import PRESETS, TrainOptions, make_options
from python_train.guidance import Guide
from python_train.network import Precond
from python_train.sample import sample
from python_train.trainer import Trainer
from python_train.world import World

_WARM_UP = graph.WARM_UP + 2  # eager steps, the capture, one of the replays
_REPEATS = 10
_EVALUATIONS = 63


@dataclass
class Row:
    """What was measured; None where it was not."""

    work: str
    batch: int
    ms: float | None = None
    ms_fastest: float | None = None
    ms_slowest: float | None = None
    images_per_second: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None
    launches: int | None = None
    launches_counted: int | None = None
    note: str = ""


def data_of(preset: str) -> tuple[int, int, int]:
    """Resolution, channels and number of classes that a preset's name stands for."""
    return _RESOLUTION_CHANNELS_LABELS[preset.split("-")[0]]


def make_trainer(
    preset: str, batch: int, device: torch.device, cuda_graph: bool = False
) -> tuple[Trainer, Callable[[], None]]:
    """A trainer of the preset's network, and one step of it on random data."""
    options = make_options(preset, batch=batch, batch_gpu=batch, cuda_graph=cuda_graph)
    resolution, channels, classes = data_of(preset)
    net = network(options, resolution, channels, classes).to(device)
    trainer = Trainer(net, options, SimpleNamespace(encode=lambda latents: latents), World(device=device))
    latents = 0.5 * torch.randn(batch, channels, resolution, resolution, device=device)
    labels = torch.eye(classes, device=device)[torch.arange(batch, device=device) % classes]
    batches = itertools.repeat((latents, labels))
    step = graph.stepper(trainer)
    return trainer, lambda: step(batches)


def time_work(row: Row, work: Callable[[], object], repeats: int = _REPEATS) -> None:
    """Fills in milliseconds, images/s, peak memory and launches."""
    for _ in range(_WARM_UP):
        work()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    row.ms, row.ms_fastest, row.ms_slowest = statistics.median(times), min(times), max(times)
    row.images_per_second = row.batch / row.ms * 1e3
    row.peak_gib = torch.cuda.max_memory_allocated() / 2**30
    row.launches = count_launches(work)


def count_launches(work: Callable[[], object]) -> int:
    """Kernels that run on the GPU; copies and fills by the driver are none."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        work()
        torch.cuda.synchronize()
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu(seen.events()))


def on_gpu(events: Iterable[Any]) -> Iterator[Any]:
    """What ran on the GPU, of a profile's events; the ranges that name parts of a program are none of it."""
    for event in events:
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            yield event


def flops_per_image(preset: str, options: TrainOptions) -> float:
    """Of forward and backward."""
    (counted,) = plan.count_rounds(options, *data_of(preset), (1,))
    return counted.flops


def training_row(preset: str, batch: int, device: torch.device, cuda_graph: bool) -> Row:
    row = Row(f"training step, {preset}" + ", CUDA graph" * cuda_graph, batch)
    trainer, step = make_trainer(preset, batch, device, cuda_graph)
    if device.type != "cuda":
        step()
        return row
    time_work(row, step)
    gpu = plan.gpu_at_hand(device)
    if gpu is not None and row.images_per_second is not None:
        peak = 1e12 * gpu.tflops(trainer.options.precision)
        row.mfu = flops_per_image(preset, trainer.options) * row.images_per_second / peak
    row.launches_counted = count_step(preset, batch).total().launches
    return row


def sampling_row(preset: str, batch: int, device: torch.device) -> Row:
    """The preset's network guided by the smallest one for the same data."""
    guide = preset if preset == "digits" else f"{preset.split('-')[0]}-xs"
    row = Row(f"sampling, {preset} guided by {guide}", batch)
    resolution, channels, classes = data_of(preset)

    def ready(name: str) -> Precond:
        return network(make_options(name), resolution, channels, classes).to(device).eval().requires_grad_(False)

    net, guiding = ready(preset), ready(guide)
    noise = torch.randn(batch, channels, resolution, resolution, device=device)
    labels = torch.eye(classes, device=device)[torch.arange(batch, device=device) % classes]

    def draw(num_steps: int = (_EVALUATIONS + 1) // 2) -> None:
        with torch.no_grad(), net.baked(), guiding.baked():
            sample(net, noise, labels, [Guide(guiding, 2.0)], num_steps=num_steps)

    if device.type == "cuda":
        time_work(row, draw, repeats=3)
    else:
        draw(num_steps=2)
    return row


def rows(presets: tuple[str, ...], batches: tuple[int, ...], sampling: bool, device: torch.device) -> Iterator[Row]:
    graphs = [False] if sampling or device.type != "cuda" else [False, True]
    for preset, batch, cuda_graph in itertools.product(presets, batches, graphs):
        try:
            if sampling:
                yield sampling_row(preset, batch, device)
            else:
                yield training_row(preset, batch, device, cuda_graph)
        except torch.OutOfMemoryError:
            yield Row(
                f"{'sampling' if sampling else 'training step'}, {preset}", batch, note="does not fit into memory"
            )
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@click.command(help=__doc__)
@click.option("--preset", "presets", multiple=True, type=click.Choice(list(PRESETS)), default=["img512-s"])
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=[32])
@click.option("--sampling", is_flag=True, help="Sampling instead of training.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows to a file.")
@click.option("--dry-run", is_flag=True, help="A tiny network on the CPU, untimed.")
def main(presets: tuple[str, ...], batches: tuple[int, ...], sampling: bool, file: Path | None, dry_run: bool) -> None:
    if dry_run:
        presets, batches = ("digits",), (2,)
    elif not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_step needs a GPU; --dry-run does without one")
    found: list[Row] = []
    for row in rows(presets, batches, sampling, torch.device("cpu" if dry_run else "cuda")):
        found.append(row)
        print(", ".join(f"{key} {value}" for key, value in asdict(row).items() if value not in (None, "")), flush=True)
        if file is not None:  # after each row: a crash loses only what follows
            file.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
