"""Every distinct convolution of EDM2 and the time that a model of the GPU expects our kernels to take for it.

python -m benchmarks.conv_problems [--preset img512-s ...] [--batch 32 ...] [--gpu H200] [--wgmma] [--all] [--csv FILE]

The problems come from the network itself, run on meta tensors. **All times are predictions**: no GPU takes part. The
model asks the library for its plan (tile, splits), counts the rounds of blocks that the multiprocessors work off, and
takes the longer of arithmetic and memory traffic:

    time = max(rounds * (products of a block / share of the tensor cores + latency), bytes / bandwidth) + parts
    parts = 2 * bytes of the parts of split sums / bandwidth + a launch

Channels that are no multiples of 8 are padded: computed as if they were, and copied once, with a launch, on the way.

The bound beside it is what no kernel can beat: max(products / peak, bytes / bandwidth), where the peak is that of
mma.sync, or with --wgmma, for the kernels that only Hopper has, the GPU's.
"""

import collections
import csv
import ctypes
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from edm2ext import _library
from edm2ext.nn import MPConv
from python_train.config import PRESETS, make_options
from python_train.network import Precond
from python_train.plan import NOMINAL_DATA

BATCHES = (8, 32, 128)
DIRECTIONS = ("forward", "grad x", "grad w")
LATENCY = 1.0e-6  # seconds until a block's first operands are there, and for storing its sums
LAUNCH = 3.0e-6
UTILITY = 0.85  # of a multiprocessor's tensor cores while it multiplies
_WGMMA_UTILITY = 0.75  # power holds the clock down


class GPU(NamedTuple):
    """Data sheet, and the share of its peak for dense 16-bit products that mma.sync can reach: all of it on Ampere;
    on Hopper, whose full rate is for wgmma, about 0.62 is reported."""

    multiprocessors: int
    peak: float  # flop/s
    mma_share: float
    bandwidth: float  # bytes/s


GPUS = {
    "A100": GPU(108, 312e12, 1.0, 1.55e12),
    "H100": GPU(132, 989e12, 0.62, 3.35e12),
    "H200": GPU(132, 989e12, 0.62, 4.8e12),
}


class Problem(NamedTuple):
    """A convolution with stride 1 and padding that keeps the size; all but the batch."""

    height: int
    width: int
    channels: int
    out: int
    kernel: int

    def products(self, batch: int) -> int:
        """Multiply-adds, of either direction."""
        return batch * self.height * self.width * self.channels * self.out * self.kernel**2

    def padded(self) -> "Problem":
        """With the channels that our kernels take."""
        return self._replace(channels=-(-self.channels // 8) * 8, out=-(-self.out // 8) * 8)

    def __str__(self) -> str:
        return f"{self.kernel}x{self.kernel} {self.channels}->{self.out} at {self.height}x{self.width}"


class Plan(NamedTuple):
    """What edm2_plan_conv answers."""

    rows: int
    columns: int
    blocks: int
    splits: int
    steps: int
    depth: int
    resident: int
    sum_rows: int
    sum_columns: int


class Prediction(NamedTuple):
    """Seconds."""

    plan: Plan
    rounds: int
    arithmetic: float
    memory: float
    parts: float
    bound: float
    padding: float = 0.0

    @property
    def time(self) -> float:
        return max(self.arithmetic, self.memory) + self.parts + self.padding


@functools.cache
def problems_of(preset: str) -> dict[Problem, int]:
    """The preset's convolutions, and how often a forward pass computes each."""
    resolution, channels, label_dim = NOMINAL_DATA[preset.split("-")[0]]
    found: collections.Counter[Problem] = collections.Counter()

    def record(layer: MPConv, inputs: tuple[Tensor, ...], _: object) -> None:
        height, width = inputs[0].shape[2:]
        assert layer.stride == layer.groups == 1
        out, channels, kernel, _ = layer.weight.shape  # of a concatenation, the input is the first part
        found[Problem(height, width, channels, out, kernel)] += 1

    with torch.device("meta"), torch.no_grad():
        net = Precond(**make_options(preset).network_config(resolution, channels, label_dim))
        for layer in net.modules():
            if isinstance(layer, MPConv):
                layer.register_forward_hook(record)
        net.eval()(torch.empty(1, channels, resolution, resolution), torch.ones(1), torch.empty(1, label_dim))
    return dict(sorted(found.items(), key=lambda item: (-item[0].height, item[0])))


def plan(problem: Problem, batch: int, direction: int, gpu: GPU, wgmma: bool = False) -> Plan:
    """What the library would do."""
    sizes = (ctypes.c_int64 * 7)(batch, *problem[:4], problem.kernel, problem.kernel)
    answer = (ctypes.c_int64 * 9)()
    ctypes.CDLL(str(_library.PATH)).edm2_plan_conv(direction, sizes, gpu.multiprocessors, int(wgmma), answer)
    return Plan(*answer)


def predict(problem: Problem, batch: int, direction: int, gpu: GPU, wgmma: bool = False) -> Prediction:
    """How long a convolution or gradient in 16 bits ought to take."""
    whole = problem.padded()
    if whole != problem:
        made = predict(whole, batch, direction, gpu, wgmma)
        return made._replace(bound=_bound(problem, batch, direction, gpu, wgmma), padding=_padding(problem, batch, gpu))
    chosen = plan(problem, batch, direction, gpu, wgmma)
    peak = gpu.peak / 2 * (1 if wgmma else gpu.mma_share)  # multiply-adds/s
    utility = _WGMMA_UTILITY if wgmma else UTILITY
    of_block = chosen.rows * chosen.columns * chosen.steps * chosen.depth
    rounds = -(-chosen.blocks // gpu.multiprocessors)
    waves = -(-chosen.blocks // (gpu.multiprocessors * chosen.resident))
    arithmetic = rounds * of_block / (peak / gpu.multiprocessors * utility) + waves * LATENCY
    parts = 0.0
    if chosen.splits > 1:
        parts = 2 * 4 * chosen.splits * chosen.sum_rows * chosen.sum_columns / gpu.bandwidth + LAUNCH
    memory = _moved(problem, batch, direction) / gpu.bandwidth
    return Prediction(chosen, rounds, arithmetic, memory, parts, _bound(problem, batch, direction, gpu, wgmma))


def _moved(problem: Problem, batch: int, direction: int) -> int:
    """Bytes of the operands and the result."""
    activations = 2 * batch * problem.height * problem.width * (problem.channels + problem.out)
    weight = problem.channels * problem.out * problem.kernel**2
    return activations + weight * (4 if direction == 2 else 2)


def _bound(problem: Problem, batch: int, direction: int, gpu: GPU, wgmma: bool) -> float:
    peak = gpu.peak / 2 * (1 if wgmma else gpu.mma_share)
    return max(problem.products(batch) / peak, _moved(problem, batch, direction) / gpu.bandwidth)


def _padding(problem: Problem, batch: int, gpu: GPU) -> float:
    """Of copies of the images to padded channels, or back; those of weights are small."""
    pixels = batch * problem.height * problem.width
    changed = [pair for pair in zip(problem[2:4], problem.padded()[2:4], strict=True) if pair[0] != pair[1]]
    return sum(2 * pixels * (few + many) / gpu.bandwidth + LAUNCH for few, many in changed)


def rows(presets: Sequence[str], batches: Sequence[int], gpu: GPU, wgmma: bool = False) -> Iterator[dict[str, object]]:
    """One for each distinct problem of the presets, batch and direction."""
    users: dict[Problem, list[str]] = {}
    for preset in presets:
        for problem in problems_of(preset):
            users.setdefault(problem, []).append(preset)
    for batch in batches:
        for problem, names in sorted(users.items(), key=lambda item: (-item[0].height, item[0])):
            for direction, name in enumerate(DIRECTIONS):
                row: dict[str, object] = {
                    "batch": batch,
                    "problem": str(problem),
                    "direction": name,
                    "gigaproducts": round(problem.products(batch) / 1e9, 3),
                    "presets": " ".join(names),
                }
                made = predict(problem, batch, direction, gpu, wgmma)
                row |= {
                    "tile": f"{made.plan.rows}x{made.plan.columns}",
                    "splits": made.plan.splits,
                    "blocks": made.plan.blocks,
                    "rounds": made.rounds,
                    "padding_us": round(made.padding * 1e6, 1),
                    "predicted_us": round(made.time * 1e6, 1),
                    "bound_us": round(made.bound * 1e6, 1),
                    "predicted_tflops": round(2 * problem.products(batch) / made.time / 1e12, 1),
                }
                yield row


def summary(presets: Sequence[str], batches: Sequence[int], gpu: GPU, wgmma: bool = False) -> Iterator[str]:
    """Markdown: the convolutions of one forward and backward pass together."""
    yield "| preset | batch | distinct | layers | 1e12 products | padded | predicted ms | bound ms | bound / time |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for preset in presets:
        found = problems_of(preset)
        for batch in batches:
            total = sum(3 * n * p.products(batch) for p, n in found.items())
            rest = sum(3 * n * p.products(batch) for p, n in found.items() if p.padded() != p)
            times = [
                (n * made.time, n * made.bound)
                for p, n in found.items()
                for made in (predict(p, batch, direction, gpu, wgmma) for direction in range(3))
            ]
            time, bound = (sum(column) for column in zip(*times, strict=True))
            cells = [preset, batch, len(found), sum(found.values()), f"{total / 1e12:.2f}", f"{rest / total:.1%}"]
            cells += [f"{time * 1e3:.2f}", f"{bound * 1e3:.2f}", f"{bound / time:.2f}"]
            yield "| " + " | ".join(map(str, cells)) + " |"


def table(found: Sequence[dict[str, object]]) -> Iterator[str]:
    """Markdown."""
    header = max(found, key=len).keys()
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in found:
        yield "| " + " | ".join(str(row.get(key, "")) for key in header) + " |"


EDM2_PRESETS = [name for name in PRESETS if name.split("-")[0] in NOMINAL_DATA]


@click.command(help=__doc__)
@click.option("--preset", "presets", multiple=True, type=click.Choice(EDM2_PRESETS), help="[default: all]")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="[default: 8, 32, 128]")
@click.option("--gpu", type=click.Choice(list(GPUS)), default="H200", show_default=True)
@click.option("--wgmma", is_flag=True, help="Kernels for Hopper's own tensor-core instructions.")
@click.option("--all", "every", is_flag=True, help="Also a row for every problem and direction.")
@click.option("--csv", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write these rows to a file.")
def main(
    presets: tuple[str, ...], batches: tuple[int, ...], gpu: str, wgmma: bool, every: bool, file: Path | None
) -> None:
    if wgmma and GPUS[gpu].mma_share == 1:
        raise click.UsageError(f"--wgmma is for Hopper, got --gpu {gpu}")
    presets, batches = presets or tuple(EDM2_PRESETS), batches or BATCHES
    kernels = "wgmma" if wgmma else "mma.sync"
    facts = ", ".join(map(str, GPUS[gpu]._asdict().items()))
    print(f"Predicted for {gpu} with {kernels}, {facts}; nothing here was measured.\n")
    print("\n".join(summary(presets, batches, GPUS[gpu], wgmma)))
    found = list(rows(presets, batches, GPUS[gpu], wgmma)) if every or file else []
    if every:
        print("", *table(found), sep="\n")
    if file is not None:
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, max(found, key=len).keys())
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
