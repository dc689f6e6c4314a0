"""The training step of `python_train`, or with --sampling its sampler, and that of a reference, side by side in one
process: identical weights, images and random numbers, results compared, timed in turns.

python -m benchmarks.compare_reference --preset img512-s --batch 32 [--reference DIR] [--variant tuned] [--sampling]

DIR is a folder with the authors' program: its network and loss run in the loop body that the papers describe. Without
it, the reference is "plain torch, official op sequence": `benchmarks.plain_network` in the same loop body. The variant
"tuned" of either is in channels_last and compiled by torch.compile as far as that runs; plain torch also takes torch's
fused attention. Sampling is Heun's method with 63 evaluations, guided by the smallest network for the same data.
Without --preset small networks are compared.
"""

from __future__ import annotations

import csv
import importlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from benchmarks import plain_sampling
from benchmarks.plain_network import PlainNetwork, TunedNetwork
from benchmarks.step_cases import BENCHMARK_16
from edm2ext.phema import power_beta
from python_train import graph, rng
from python_train.config import PRECISIONS, PRESETS, TrainOptions, make_options
from python_train.data import PixelEncoder
from python_train.loss import EDM2Loss
from python_train.network import Precond
from python_train.trainer import Trainer, learning_rate
from python_train.world import World

LAUNCHES = 6_103  # of the U-Net of img512-s, forward and backward, in the plain network; 6,108 were counted elsewhere
_SHAPES = {"img512": (64, 4, 1000), "img64": (64, 3, 1000), "digits": (8, 1, 10)}
VARIANTS = ("published", "tuned")
GUIDANCE = 2.0
Batches = Iterator[tuple[Tensor, Tensor]]
Shape = tuple[int, int, int]  # resolution, channels, classes


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


class Reference:
    """Makes what we are compared with: the authors' program in ``folder``, which it runs, or plain torch."""

    def __init__(self, folder: Path | None, variant: str) -> None:
        self.tuned = variant == "tuned"
        self.name = "plain torch, official op sequence"
        self.network: Callable[..., torch.nn.Module] | None = None
        self.loss: Callable[..., Any] = EDM2Loss
        if folder is not None:
            self.name = "authors' program"
            self.network, self.loss = _authors(folder)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    def call_of(self, net: Precond) -> tuple[torch.nn.Module, Callable[..., Any]]:
        """A module with net's weights, and how to call it."""
        if self.network is None:
            return net, TunedNetwork(net) if self.tuned else PlainNetwork(net)
        module = self.network(**net.config)
        module.load_state_dict(net.state_dict())
        module = module.to(next(net.parameters()).device)
        if not self.tuned:
            return module, module
        compiled = torch.compile(module.to(memory_format=torch.channels_last), dynamic=False)
        return module, lambda x, *rest, **named: compiled(
            x.contiguous(memory_format=torch.channels_last), *rest, **named
        )

    def loop(self, net: Precond, options: TrainOptions) -> PublishedLoop:
        module, call = self.call_of(net)
        loss = self.loss(P_mean=options.P_mean, P_std=options.P_std, sigma_data=net.sigma_data)
        return PublishedLoop(module, call, loss, options)

    def description(self) -> str:
        """What it was, told after it ran: how much of it torch.compile could take, instead of leaving it eager."""
        if not self.tuned:
            return self.name
        fused = "SDPA, " if self.network is None else ""
        frames = torch._dynamo.utils.counters["frames"]
        return f"{self.name}, channels_last, {fused}{frames['ok']} of {frames['total']} frames compiled"


def _authors(folder: Path) -> tuple[Callable[..., torch.nn.Module], Callable[..., Any]]:
    """Their network and loss."""
    sys.path.insert(0, str(folder))
    try:
        network = importlib.import_module("training.networks_edm2").Precond
        return network, importlib.import_module("training.training_loop").EDM2Loss
    except (ImportError, AttributeError) as error:
        raise click.ClickException(f"{folder} does not hold the authors' program: {error}") from error
    finally:
        sys.path.remove(str(folder))


def network(options: TrainOptions, shape: Shape, device: torch.device) -> Precond:
    """The network at the start of training, but with gains that let every path take part."""
    torch.manual_seed(0)
    net = Precond(**options.network_config(*shape))
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.5)
    return net.to(device)


def batches(options: TrainOptions, shape: Shape, device: torch.device) -> Batches:
    resolution, channels, label_dim = shape
    generator = torch.Generator().manual_seed(1)
    size = options.rounds(1)[0]
    images = torch.randint(0, 256, [size, channels, resolution, resolution], dtype=torch.uint8, generator=generator)
    labels = torch.eye(label_dim)[torch.randint(0, label_dim, [size], generator=generator)]
    pair = images.to(device), labels.to(device)
    while True:
        yield pair


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The time of it: on a CPU with one thread the processor's, which other programs disturb little."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


class Comparison(NamedTuple):
    """Seconds of each pair, ours first, without the warm-up, and the largest relative difference of results."""

    times: list[tuple[float, float]]
    difference: float


def compare(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], device: torch.device, rounds: int, warm_up: int
) -> Comparison:
    """Both in turns; who goes first alternates. They return what must agree."""
    times, difference = [], 0.0
    for index in range(warm_up + rounds):
        took: dict[bool, float] = {}
        results: dict[bool, Tensor] = {}
        for own in (True, False) if index % 2 == 0 else (False, True):
            took[own] = seconds(lambda: results.update({own: (ours if own else theirs)()}), device)  # noqa: B023
        times.append((took[True], took[False]))
        got, expected = results[True].double(), results[False].double()
        difference = max(difference, float((got - expected).norm() / expected.norm()))
    return Comparison(times[warm_up:], difference)


def compare_steps(
    reference: Reference, options: TrainOptions, shape: Shape, device: torch.device, rounds: int, warm_up: int
) -> Comparison:
    """Training steps, with their losses as the result."""
    loop = reference.loop(network(options, shape, device), options)
    trainer = Trainer(network(options, shape, device), options, world=World(device=device))
    step, stream = graph.stepper(trainer), batches(options, shape, device)

    def ours() -> Tensor:
        step(stream)
        return trainer.losses[-1].mean()

    def theirs() -> Tensor:
        loop.step(stream)
        return loop.mean

    return compare(ours, theirs, device, rounds, warm_up)


@torch.no_grad()
def compare_sampling(
    reference: Reference,
    options: TrainOptions,
    smaller: TrainOptions,
    shape: Shape,
    device: torch.device,
    evaluations: int,
    rounds: int,
    warm_up: int,
) -> Comparison:
    """A batch of samples, with the images as the result."""
    resolution, channels, label_dim = shape
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(options.batch, channels, resolution, resolution, generator=generator).to(device)
    labels = torch.eye(label_dim)[torch.arange(options.batch) % label_dim].to(device)
    steps = (evaluations + 1) // 2
    nets = [network(which, shape, device).eval().requires_grad_(False) for which in (options, smaller)]
    copies = [network(which, shape, device).eval().requires_grad_(False) for which in (options, smaller)]
    calls = [reference.call_of(copy)[1] for copy in copies]
    with nets[0].baked(), nets[1].baked():
        ours = plain_sampling.ours(nets[0], nets[1], GUIDANCE, noise, labels, steps)
        theirs = partial(plain_sampling.published, *calls, GUIDANCE, noise, labels, steps)
        return compare(ours, theirs, device, rounds, warm_up)


@click.command(help=__doc__)
@click.option(
    "--reference", type=click.Path(exists=True, file_okay=False, path_type=Path), help="The authors' program."
)
@click.option("--variant", type=click.Choice(VARIANTS), default="published", show_default=True)
@click.option("--sampling", is_flag=True, help="Compare sampling instead of training steps.")
@click.option("--evaluations", default=63, show_default=True, help="Of each network, when sampling.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="[default: a network of 3.4 M parameters, 16×16]")
@click.option("--batch", default=32, show_default=True)
@click.option("--batch-gpu", type=int)
@click.option("--precision", type=click.Choice(PRECISIONS), help="[default: fp16 on a GPU, fp32 on a CPU]")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--force-normalize", type=click.Choice(["forward", "step"]), default="forward", show_default=True)
@click.option("--cuda-graph", is_flag=True, help="Replay our step from a CUDA graph.")
@click.option("--rounds", default=11, show_default=True)
@click.option("--warm-up", default=4, show_default=True)
@click.option("--threads", type=int)
@click.option("--tolerance", type=float, help="Largest relative difference.  [default: fp32 1e-4, else 0.02]")
@click.option("--csv", "file", type=click.Path(dir_okay=False, path_type=Path), help="Append the result to this file.")
def main(
    reference: Path | None,
    variant: str,
    sampling: bool,
    evaluations: int,
    preset: str | None,
    batch: int,
    batch_gpu: int | None,
    precision: str | None,
    device: str,
    force_normalize: str,
    cuda_graph: bool,
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
    beside = Reference(reference, variant)
    if sampling:
        smaller, guide = _smaller(preset, options)
        found = compare_sampling(beside, options, smaller, shape, where, evaluations, rounds, warm_up)
        what = f"sampling, Heun, {evaluations} evaluations, guided by {guide}"
        settings = ", networks in one CUDA graph" * (where.type == "cuda")
    else:
        found = compare_steps(beside, options, shape, where, rounds, warm_up)
        what, settings = "training step", f", force-normalize {force_normalize}" + ", CUDA graph" * cuda_graph
    ours, other = (statistics.median(column) for column in zip(*found.times, strict=True))
    speedup = statistics.median(b / a for a, b in found.times)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": torch.cuda.get_device_name(where) if where.type == "cuda" else _cpu(),
        "torch": torch.__version__,
        "what": what,
        "reference": beside.description(),
        "network": preset or "16x16, 3.4 M parameters",
        "options": f"batch {batch}, {precision}{settings}",
        "ours images/s": f"{batch / ours:.2f}",
        "reference images/s": f"{batch / other:.2f}",
        "speed-up": f"{speedup:.2f}",
        "largest relative difference": f"{found.difference:.1e}",
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
    if not found.difference <= (tolerance or (1e-4 if precision == "fp32" else 0.02)):
        sys.exit("the results differ: the two do not compute the same")


def _smaller(preset: str | None, options: TrainOptions) -> tuple[TrainOptions, str]:
    """The guide: the smallest network for the preset's data; half the channels where there is only one."""
    xs = f"{preset.partition('-')[0]}-xs" if preset else ""
    if xs in PRESETS:
        return replace(make_options(xs), batch=options.batch, precision=options.precision), xs
    return replace(options, model_channels=options.model_channels // 2), "one with half the channels"


def _cpu() -> str:
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
