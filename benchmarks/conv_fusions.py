"""What it saves, by the model of `benchmarks.conv_problems`, if convolutions do while loading or storing what passes of
their own do before or after them.

python -m benchmarks.conv_fusions [--preset img512-s ...] [--batch 32 ...] [--gpu H200] [--wgmma]

**All times are predictions**, of the forward pass in training: the passes that a fusion changes and their convolutions,
without it and with it. With P the bytes of the convolution's input, and Q of its output:

  MP-Cat halves   the 1x1 skip convolution of a decoder block reads both inputs of MP-Cat. Without: MP-Cat reads P and
                  writes P and, of MP-SiLU, P. With: it writes MP-SiLU only.
  upsampling      the 3x3 convolution behind a 2x upsampling reads the small image. Without: upsampling reads P / 4 and
                  writes P, MP-SiLU reads and writes P. With: MP-SiLU reads and writes P / 4, and upsampling, for the
                  main branch, is as before. (MP-SiLU commutes with it, where its filter is [1, 1].)
  MP-SiLU         the first 3x3 convolution of every block takes it on load. Without: the pass before writes P more.
                  With: an exponential and a quotient, of 16 a cycle and multiprocessor, for every element on its way to
                  shared memory, nine times for nine taps and again for every column of tiles. Two figures: if all of it
                  hides behind the products, and if none does.
  q, k and v      the 1x1 convolution before attention normalises them while storing. Without: a pass reads Q and writes
                  Q. With: the convolution writes Q more, by the tile as wide as a head and with whole sums.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import click
import torch

from benchmarks.conv_problems import (
    BATCHES,
    EDM2_PRESETS,
    GPU,
    GPUS,
    LATENCY,
    LAUNCH,
    UTILITY,
    Problem,
    predict,
    problems_of,
)
from python_train.config import make_options
from python_train.network import Block, Precond
from python_train.plan import NOMINAL_DATA

_CLOCK = 1.8e9  # Hz
_SPECIAL = 16  # exponentials or reciprocals of a multiprocessor in a cycle
_SPECIAL_OF_SILU = 2


class Place(NamedTuple):
    """A block, and the size of the images that its convolutions see."""

    block: Block
    height: int
    width: int

    def problem(self, layer: torch.nn.Module) -> Problem:
        out, channels, kernel, _ = layer.weight.shape
        return Problem(self.height, self.width, channels, out, kernel)


class Saving(NamedTuple):
    """Seconds."""

    without: float
    with_it: float


@functools.cache
def places(preset: str) -> tuple[Place, ...]:
    """The preset's blocks."""
    resolution, channels, label_dim = NOMINAL_DATA[preset.split("-")[0]]
    found = []
    with torch.device("meta"), torch.no_grad():
        net = Precond(**make_options(preset).network_config(resolution, channels, label_dim))
        for block in net.modules():
            if isinstance(block, Block):
                block.register_forward_hook(lambda block, _, y: found.append(Place(block, *y.shape[2:])))
        net.eval()(torch.empty(1, channels, resolution, resolution), torch.ones(1), torch.empty(1, label_dim))
    return tuple(found)


def _input_bytes(problem: Problem, batch: int) -> int:
    return 2 * batch * problem.height * problem.width * problem.channels


def cat_halves(preset: str, batch: int, gpu: GPU, wgmma: bool) -> Saving:
    without = with_it = 0.0
    for place in places(preset):
        if place.block.flavor == "dec" and place.block.conv_skip is not None:
            problem = place.problem(place.block.conv_skip)
            moved = _input_bytes(problem, batch) / gpu.bandwidth
            product = predict(problem, batch, 0, gpu, wgmma).time
            without += 3 * moved + LAUNCH + product
            with_it += 2 * moved + LAUNCH + product
    return Saving(without, with_it)


def upsampling(preset: str, batch: int, gpu: GPU, wgmma: bool) -> Saving:
    without = with_it = 0.0
    for place in places(preset):
        if place.block.resample_mode == "up":
            problem = place.problem(place.block.conv_res0)
            moved = _input_bytes(problem, batch) / gpu.bandwidth
            made = predict(problem, batch, 0, gpu, wgmma)
            without += 3.25 * moved + made.time
            with_it += 1.75 * moved + max(made.arithmetic, made.memory - 0.75 * moved) + made.parts
    return Saving(without, with_it)


def silu_on_load(preset: str, batch: int, gpu: GPU, wgmma: bool, hidden: bool) -> Saving:
    without = with_it = 0.0
    for place in places(preset):
        problem = place.problem(place.block.conv_res0)
        made = predict(problem, batch, 0, gpu, wgmma)
        loaded = made.rounds * made.plan.rows * made.plan.steps * made.plan.depth  # by a multiprocessor
        special = loaded * _SPECIAL_OF_SILU / _SPECIAL / _CLOCK
        without += _input_bytes(problem, batch) / gpu.bandwidth + made.time
        if hidden:
            with_it += max(made.arithmetic, made.memory, special) + made.parts
        else:
            with_it += made.time + special
    return Saving(without, with_it)


def heads(preset: str, batch: int, gpu: GPU, wgmma: bool) -> Saving:
    """q, k and v; the kernel that normalises them is the portable one."""
    without = with_it = 0.0
    for place in places(preset):
        if place.block.attn_qkv is not None:
            problem = place.problem(place.block.attn_qkv)
            out = 2 * batch * place.height * place.width * problem.out / gpu.bandwidth
            without += predict(problem, batch, 0, gpu, wgmma).time + 2 * out + LAUNCH
            rows, columns = 128, 192
            tiles = -(-batch * place.height * place.width // rows) * (problem.out // columns)
            rounds = -(-tiles // gpu.multiprocessors)
            rate = gpu.peak / 2 * gpu.mma_share * UTILITY / gpu.multiprocessors
            arithmetic = rounds * (rows * columns * -(-problem.channels // 32) * 32 / rate + LATENCY)
            with_it += max(arithmetic, predict(problem, batch, 0, gpu).memory + out)
    return Saving(without, with_it)


def table(presets: Sequence[str], batches: Sequence[int], gpu: GPU, wgmma: bool) -> Iterator[str]:
    """Markdown: milliseconds without and with each, and what it saves of all convolutions' time, gradients included."""
    names = ("q, k and v", "MP-Cat halves", "upsampling", "MP-SiLU, hidden", "MP-SiLU, not hidden")
    yield "| preset | batch | convolutions ms | " + " | ".join(f"{name} ms | saves" for name in names) + " |"
    yield "|---|---:|---:|" + "---:|---:|" * len(names)
    for preset in presets:
        for batch in batches:
            total = sum(
                count * predict(problem, batch, direction, gpu, wgmma).time
                for problem, count in problems_of(preset).items()
                for direction in range(3)
            )
            arguments = (preset, batch, gpu, wgmma)
            savings = [heads(*arguments), cat_halves(*arguments), upsampling(*arguments)]
            savings += [silu_on_load(*arguments, hidden) for hidden in (True, False)]
            cells = [
                f"{saving.without * 1e3:.3f} → {saving.with_it * 1e3:.3f} | "
                f"{(saving.without - saving.with_it) / total:.1%}"
                for saving in savings
            ]
            yield f"| {preset} | {batch} | {total * 1e3:.2f} | " + " | ".join(cells) + " |"


@click.command(help=__doc__)
@click.option("--preset", "presets", multiple=True, type=click.Choice(EDM2_PRESETS), default=["img512-s", "img512-xxl"])
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=BATCHES, show_default=True)
@click.option("--gpu", type=click.Choice(list(GPUS)), default="H200", show_default=True)
@click.option("--wgmma", is_flag=True, help="Kernels for Hopper's own tensor-core instructions.")
def main(presets: tuple[str, ...], batches: tuple[int, ...], gpu: str, wgmma: bool) -> None:
    if wgmma and GPUS[gpu].mma_share == 1:
        raise click.UsageError(f"--wgmma is for Hopper, got --gpu {gpu}")
    print(f"Predicted for {gpu} with {'wgmma' if wgmma else 'mma.sync'}; nothing here was measured.\n")
    print("\n".join(table(presets, batches, GPUS[gpu], wgmma)))


if __name__ == "__main__":
    main()
