"""The training step of `python_train` and that of a reference, side by side in one process: identical weights, images
and random numbers, losses compared, steps timed in turns.

python -m benchmarks.compare_reference --preset img512-s --batch 32 [--reference DIR]

DIR is a folder with the authors' program: its network and loss run in the loop body that the papers describe. Without
it, the reference is "plain torch, official op sequence": `benchmarks.plain_network` in the same loop body. Without
--preset a small network is compared.
"""

from __future__ import annotations

import csv
import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.plain_network import PlainNetwork
from benchmarks.step_cases import BENCHMARK_16
from edm2ext.phema import power_beta
from python_train import graph, rng
from python_train.config import PRECISIONS, PRESETS, TrainOptions, make_options
from python_train.data import PixelEncoder
from python_train.loss import EDM2Loss
from python_train.network import Precond
from python_train.trainer import Trainer, learning_rate
from python_train.world import World

LAUNCHES = 6_104  # of the U-Net of img512-s, forward and backward, in the plain network; 6,108 were counted elsewhere
_SHAPES = {"img512": (64, 4, 1000), "img64": (64, 3, 1000), "digits": (8, 1, 10)}
Batches = Iterator[tuple[Tensor, Tensor]]


class PublishedLoop:
    """The body of the published training loop around any network with the layout of `Precond` (4.1 to 4.3, 5.1): eager
    Adam, gradients made finite one by one, averages updated parameter by parameter."""

    def __init__(
        self, net: torch.nn.Module, call: Callable[..., Any], loss: Callable[..., Tensor], options: TrainOptions
    ) -> None:
        self.net = net.train().requires_grad_(True)
        self.call, self.loss, self.options = call, loss, options
        self.encoder = PixelEncoder()
        self.optimizer = torch.optim.Adam(net.parameters(), lr=options.lr, betas=(0.9, 0.99), eps=1e-8)
        self.averages = [[param.detach().clone() for param in net.parameters()] for _ in options.sigma_rels]
        self.nimg = 0
        self.mean = torch.zeros(())

    def step(self, batches: Batches) -> None:
        options = self.options
        rng.reseed(options.seed, 0, self.nimg)
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(rounds := options.rounds(1)[1]):
            stored, labels = next(batches)
            loss = self.loss(self.call, self.encoder.encode(stored), labels)
            self.mean = loss.detach().mean()
            (loss.sum() * (options.loss_scaling / (len(stored) * rounds))).backward()
        lr = learning_rate(self.nimg, options.batch, options.lr, options.decay, options.rampup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for param in self.net.parameters():
            torch.nan_to_num(param.grad, nan=0, posinf=0, neginf=0, out=param.grad)
        self.optimizer.step()
        self.nimg += options.batch
        for average, beta in zip(self.averages, power_beta(self.nimg, options.batch, options.sigma_rels), strict=True):
            for value, param in zip(average, self.net.parameters(), strict=True):
                value.lerp_(param.detach(), 1 - float(beta))


def plain(net: Precond, options: TrainOptions) -> PublishedLoop:
    """Plain torch, official op sequence."""
    return PublishedLoop(net, PlainNetwork(net), EDM2Loss(options.P_mean, options.P_std, net.sigma_data), options)


def authors(folder: Path, net: Precond, options: TrainOptions) -> PublishedLoop:
    """The authors' network, with our weights, and their loss. Runs their code."""
    sys.path.insert(0, str(folder))
    try:
        network = importlib.import_module("training.networks_edm2").Precond
        loss = importlib.import_module("training.training_loop").EDM2Loss
    except (ImportError, AttributeError) as error:
        raise click.ClickException(f"{folder} does not hold the authors' program: {error}") from error
    finally:
        sys.path.remove(str(folder))
    theirs = network(**net.config)
    theirs.load_state_dict(net.state_dict())
    theirs = theirs.to(next(net.parameters()).device)
    made = loss(P_mean=options.P_mean, P_std=options.P_std, sigma_data=net.sigma_data)
    return PublishedLoop(theirs, theirs, made, options)


def network(options: TrainOptions, shape: tuple[int, int, int], device: torch.device) -> Precond:
    """The network at the start of training, but with gains that let every path take part."""
    torch.manual_seed(0)
    net = Precond(**options.network_config(*shape))
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.5)
    return net.to(device)


def batches(options: TrainOptions, shape: tuple[int, int, int], device: torch.device) -> Batches:
    resolution, channels, label_dim = shape
    generator = torch.Generator().manual_seed(1)
    size = options.rounds(1)[0]
    images = torch.randint(0, 256, [size, channels, resolution, resolution], dtype=torch.uint8, generator=generator)
    labels = torch.eye(label_dim)[torch.randint(0, label_dim, [size], generator=generator)]
    pair = images.to(device), labels.to(device)
    while True:
        yield pair


def seconds(step: Callable[[Batches], None], stream: Batches, device: torch.device) -> float:
    """The time of a step: on a CPU with one thread the processor's, which other programs disturb little."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step(stream)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def compare(
    trainer: Trainer, reference: PublishedLoop, stream: Batches, rounds: int, warm_up: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(seconds, losses) of each pair of steps, the trainer's first; times without the warm-up. Who goes first
    alternates."""
    device = trainer.world.device
    ours = graph.stepper(trainer)
    times, losses = [], []
    for index in range(warm_up + rounds):
        pair = {}
        for step in (ours, reference.step) if index % 2 == 0 else (reference.step, ours):
            pair[step] = seconds(step, stream, device)
        times.append((pair[ours], pair[reference.step]))
        losses.append((float(trainer.losses[-1].mean()), float(reference.mean)))
    return times[warm_up:], losses


def difference(losses: list[tuple[float, float]]) -> float:
    """The largest relative difference between the two losses of a step."""
    return max(abs(a - b) / abs(b) for a, b in losses)


@click.command(help=__doc__)
@click.option(
    "--reference", type=click.Path(exists=True, file_okay=False, path_type=Path), help="The authors' program."
)
@click.option("--preset", type=click.Choice(list(PRESETS)), help="[default: a network of 3.4 M parameters, 16×16]")
@click.option("--batch", default=32, show_default=True)
@click.option("--batch-gpu", type=int)
@click.option("--precision", type=click.Choice(PRECISIONS), help="[default: fp16 on a GPU, fp32 on a CPU]")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--force-normalize", type=click.Choice(["forward", "step"]), default="forward", show_default=True)
@click.option("--cuda-graph", is_flag=True, help="Replay our step from a CUDA graph.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the reference's network with torch.compile.")
@click.option("--rounds", default=11, show_default=True)
@click.option("--warm-up", default=4, show_default=True)
@click.option("--threads", type=int)
@click.option("--tolerance", type=float, help="Largest relative difference of losses.  [default: fp32 1e-4, else 0.02]")
@click.option("--csv", "file", type=click.Path(dir_okay=False, path_type=Path), help="Append the result to this file.")
def main(
    reference: Path | None,
    preset: str | None,
    batch: int,
    batch_gpu: int | None,
    precision: str | None,
    device: str,
    force_normalize: str,
    cuda_graph: bool,
    compiled: bool,
    rounds: int,
    warm_up: int,
    threads: int | None,
    tolerance: float | None,
    file: Path | None,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(device)
    precision = precision or ("fp16" if where.type == "cuda" else "fp32")
    chosen = {"batch": batch, "batch_gpu": batch_gpu, "precision": precision, "rampup": 0, "duration": batch}
    chosen |= {"force_normalize": force_normalize, "cuda_graph": cuda_graph}
    options = make_options(preset, **({} if preset else vars(BENCHMARK_16) | {"channels_per_head": 64}) | chosen)
    shape = _SHAPES[preset.partition("-")[0]] if preset else (16, 3, 10)
    theirs = network(options, shape, where)
    loop = plain(theirs, options) if reference is None else authors(reference, theirs, options)
    if compiled:
        loop.call = torch.compile(loop.call, dynamic=False)
    trainer = Trainer(network(options, shape, where), options, world=World(device=where))
    times, losses = compare(trainer, loop, batches(options, shape, where), rounds, warm_up)
    ours, other = (statistics.median(column) for column in zip(*times, strict=True))
    speedup = statistics.median(b / a for a, b in times)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name(where) if where.type == "cuda" else _cpu(),
        "torch": torch.__version__,
        "reference": "plain torch, official op sequence" if reference is None else "authors' program",
        "network": preset or "16x16, 3.4 M parameters",
        "options": f"batch {batch}, {precision}, force-normalize {force_normalize}"
        + ", CUDA graph" * cuda_graph
        + ", reference compiled" * compiled,
        "ours images/s": f"{batch / ours:.2f}",
        "reference images/s": f"{batch / other:.2f}",
        "speed-up": f"{speedup:.2f}",
        "largest difference of losses": f"{difference(losses):.1e}",
    }
    for name, value in result.items():
        print(f"{name:<30}{value}")
    if file is not None:
        new = not file.exists()
        with open(file, "a", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, result)
            if new:
                writer.writeheader()
            writer.writerow(result)
    if difference(losses) > (tolerance or (1e-4 if precision == "fp32" else 0.02)):
        sys.exit("the losses differ: the two do not compute the same")


def _cpu() -> str:
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
