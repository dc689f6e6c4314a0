"""What `benchmarks.run` times at the level of the whole training step: forward, loss, backward, Adam and EMA."""

import itertools
from collections.abc import Iterator

import torch

from benchmarks.op_cases import Case
from benchmarks.plain_step import PlainTrainer
from python_train.config import TrainOptions, make_options
from python_train.data import PixelEncoder
from python_train.network import Precond
from python_train.trainer import Trainer

BENCHMARK_16 = TrainOptions(
    model_channels=32, channel_mult=(1, 2, 3), num_blocks=3, batch=32, duration=32, precision="fp32", rampup=0, decay=0
)


def network(options: TrainOptions, resolution: int, channels: int, label_dim: int = 10) -> Precond:
    """A network whose gains are set so that every path carries a signal."""
    torch.manual_seed(0)
    net = Precond(**options.network_config(resolution, channels, label_dim))
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.5)
    return net


def step_case(name: str, options: TrainOptions, resolution: int, channels: int) -> Case:
    native, plain = (
        kind(network(options, resolution, channels), options, PixelEncoder()) for kind in (Trainer, PlainTrainer)
    )
    images = torch.randint(256, [options.batch, channels, resolution, resolution], dtype=torch.uint8)
    labels = torch.eye(10)[torch.arange(options.batch) % 10]
    batches = itertools.repeat((images, labels))
    params = sum(p.numel() for p in native.params) / 1e6
    return Case(
        f"training step, {name}, {params:.2f} M parameters, {options.precision}",
        lambda: native.step(batches),
        plain=lambda: plain.step(batches),
    )


def all_cases() -> Iterator[Case]:
    yield step_case("demo preset (8×8, batch 128)", make_options("digits"), 8, 1)
    yield step_case("16×16, batch 32", BENCHMARK_16, 16, 3)


def network_weights() -> list[torch.Tensor]:
    """The weight tensors of the 16×16 network, for the multi-tensor rows."""
    return [layer.weight.detach() for layer in network(BENCHMARK_16, 16, 3).prepared_weights().layers]
