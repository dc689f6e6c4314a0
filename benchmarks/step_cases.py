"""What `benchmarks.run` times at the level of the whole training step: forward, loss, backward, Adam and EMA."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.op_cases import Case, Work
from benchmarks.plain_step import PlainTrainer
from python_train.config import TrainOptions, make_options
from python_train.data import PixelEncoder
from python_train.network import Precond
from python_train.trainer import Trainer, fastest_precision

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


@dataclass(frozen=True)
class Steps:
    """The training steps of one network in one precision: ours and plain torch's."""

    precision: str
    params: int
    native: Work
    plain: Work


def steps(options: TrainOptions, resolution: int, channels: int) -> Steps:
    native, plain = (
        kind(network(options, resolution, channels), options, PixelEncoder()) for kind in (Trainer, PlainTrainer)
    )
    images = torch.randint(256, [options.batch, channels, resolution, resolution], dtype=torch.uint8)
    labels = torch.eye(10)[torch.arange(options.batch) % 10]
    batches = itertools.repeat((images, labels))
    params = sum(p.numel() for p in native.params)
    return Steps(options.precision, params, lambda: native.step(batches), lambda: plain.step(batches))


def precisions() -> tuple[str, ...]:
    """bf16 only where there are instructions for it: elsewhere torch takes several times as long as in fp32."""
    return ("fp32", "bf16") if fastest_precision(torch.device("cpu")) == "bf16" else ("fp32",)


def all_steps() -> Iterator[tuple[str, list[Steps]]]:
    """Both networks, by name, in every precision."""
    for name, options, shape in (
        ("demo preset (8×8, batch 128)", make_options("digits"), (8, 1)),
        ("16×16, batch 32", BENCHMARK_16, (16, 3)),
    ):
        yield name, [steps(replace(options, precision=precision), *shape) for precision in precisions()]


def all_cases() -> Iterator[Case]:
    """Each precision against plain torch in the same, and ours in bf16 against plain torch in fp32."""
    for name, found in all_steps():
        label = f"training step, {name}, {found[0].params / 1e6:.2f} M parameters"
        for each in found:
            yield Case(f"{label}, {each.precision}", each.native, plain=each.plain)
        for each in found[1:]:
            yield Case(f"{label}, {each.precision} against fp32", each.native, plain=found[0].plain)


def network_weights() -> list[torch.Tensor]:
    """The weight tensors of the 16×16 network, for the multi-tensor rows."""
    return [layer.weight.detach() for layer in network(BENCHMARK_16, 16, 3).prepared_weights().layers]
