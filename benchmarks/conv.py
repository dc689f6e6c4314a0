"""Our convolution kernels against cuDNN on the GPU at hand, problem by problem.

python -m benchmarks.conv [--preset img512-s ...] [--batch 32 ...] [--dtype fp16] [--search] [--csv FILE]

For every distinct convolution of the presets and each of its directions: milliseconds of our kernels with the plan that
the library chooses, or with --search the best of all tiles and several splits; of cuDNN in channels_last with
`benchmark=True`; and the bound max(products / measured rate of a matrix product, bytes / measured rate of a copy).
Medians of CUDA-event timings, each after the L2 cache was overwritten. The geometric means come last.
"""

import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

import edm2ext
from benchmarks.conv_problems import _EDM2_PRESETS, DIRECTIONS, Problem, problems_of

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_REPEATS = 15
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def milliseconds(work: Callable[[], object], flush: Tensor) -> float:
    """The median over cold calls."""
    times = []
    for index in range(_REPEATS + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def ours(direction: int, x: Tensor, w: Tensor, g: Tensor, plan: list[int]) -> Callable[[], Tensor]:
    native = torch.ops.edm2
    if direction == 0:
        return lambda: native.mp_conv2d(x, w, None, plan)
    if direction == 1:
        return lambda: native.mp_conv2d_backward_input(g, w, plan)
    return lambda: native.mp_conv2d_backward_weight(g, x, *w.shape[2:], plan)


def cudnn(direction: int, x: Tensor, w: Tensor, g: Tensor) -> Callable[[], object]:
    padding = [size // 2 for size in w.shape[2:]]
    if direction == 0:
        return lambda: F.conv2d(x, w, padding=padding)
    wanted = [direction == 1, direction == 2, False]
    arguments = (None, [1, 1], padding, [1, 1], False, [0, 0], 1, wanted)
    return lambda: torch.ops.aten.convolution_backward(g, x, w, *arguments)


def plans(direction: int, problem: Problem, batch: int, search: bool) -> Iterator[list[int]]:
    """The library's own choice, then all others that are to be tried."""
    yield []
    if not search:
        return
    depth = problem.channels if direction == 0 else problem.out
    pixels = batch * problem.height * problem.width
    steps = -(-pixels // 32) if direction == 2 else problem.kernel**2 * -(-depth // 32)
    for tile in range(4):
        yield from ([tile, splits] for splits in _SPLITS if splits <= steps)


def rates(dtype: torch.dtype, flush: Tensor) -> tuple[float, float]:
    """Multiply-adds of a large matrix product, and bytes of a copy, in a millisecond."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    product = 8192**3 / milliseconds(lambda: a @ a, flush)
    big = torch.empty(2**28, device="cuda", dtype=torch.float32)
    copy = 2 * 4 * big.numel() / milliseconds(big.clone, flush)
    return product, copy


@click.command(help=__doc__)
@click.option("--preset", "presets", multiple=True, type=click.Choice(_EDM2_PRESETS), default=["img512-s"])
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=[32])
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="fp16", show_default=True)
@click.option("--search", is_flag=True, help="Try all tiles and several splits, and take the fastest.")
@click.option("--csv", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows to a file.")
def main(presets: tuple[str, ...], batches: tuple[int, ...], dtype: str, search: bool, file: Path | None) -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks.conv needs a GPU; benchmarks.conv_problems predicts without one")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("edm2::mp_conv2d", "CUDA"):
        sys.exit(f"the library has no convolutions: {edm2ext.build_info()['build']}")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    flush = torch.empty(2**27, device="cuda", dtype=torch.float32)
    product_rate, copy_rate = rates(_DTYPES[dtype], flush)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {dtype}")
    print(f"matrix product {2 * product_rate / 1e9:.0f} TFLOP/s, copy {copy_rate / 1e9:.2f} TB/s\n")
    print("| batch | problem | direction | plan | ours ms | TFLOP/s | cuDNN ms | cuDNN / ours | bound / ours |")
    print("|---:|---|---|---|---:|---:|---:|---:|---:|")
    rows = []
    problems = {problem: None for preset in presets for problem in problems_of(preset) if problem.served}
    for batch in batches:
        for problem in problems:
            height, width, channels, out, kernel = problem

            def make(*sizes: int) -> Tensor:
                values = torch.randn(sizes, device="cuda", dtype=_DTYPES[dtype])
                return values.contiguous(memory_format=torch.channels_last)

            x, g = make(batch, channels, height, width), make(batch, out, height, width)
            w = make(out, channels, kernel, kernel)
            for direction, name in enumerate(DIRECTIONS):
                tried = [
                    (milliseconds(ours(direction, x, w, g, plan), flush), plan)
                    for plan in plans(direction, problem, batch, search)
                ]
                own, plan = min(tried)
                theirs = milliseconds(cudnn(direction, x, w, g), flush)
                moved = 2 * (x.numel() + g.numel()) + w.numel() * (4 if direction == 2 else 2)
                bound = max(problem.products(batch) / product_rate, moved / copy_rate)
                row = {
                    "batch": batch,
                    "problem": str(problem),
                    "direction": name,
                    "plan": "x".join(map(str, plan)) or "own",
                    "ours ms": f"{own:.4f}",
                    "TFLOP/s": f"{2 * problem.products(batch) / own / 1e9:.0f}",
                    "cuDNN ms": f"{theirs:.4f}",
                    "cuDNN / ours": f"{theirs / own:.3f}",
                    "bound / ours": f"{bound / own:.3f}",
                }
                rows.append(row)
                print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
    for column in ("cuDNN / ours", "bound / ours"):
        mean = math.exp(statistics.fmean(math.log(float(row[column])) for row in rows))
        print(f"\ngeometric mean of {column}: {mean:.3f}")
    if file is not None:
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
