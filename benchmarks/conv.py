"""Our convolution kernels against cuDNN on the GPU at hand, problem by problem.

python -m benchmarks.conv [--preset img512-s ...] [--batch 32 ...] [--precision fp16] [--search] [--csv FILE]

For every distinct convolution of a training step of the presets and each of its gradients, with what follows it in the
forward pass, or with MP-SiLU of the MP-Cat whose halves it reads: milliseconds of our kernels with the plan that the
library chooses, or with --search the best of those that `edm2ext.tune` tries; of cuDNN in channels_last with
`benchmark=True`, alone and with the same things done by separate kernels; of the tuner's choice among all of these; and
the bound max(products / measured rate of a matrix product, bytes of the fused operation / measured rate of a copy).
Medians of CUDA-event timings, each after the second-level cache was overwritten. Geometric means come last, and how
many rows are as fast as cuDNN.
"""

import contextlib
import csv
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import torch
from torch import Tensor

import edm2ext
from benchmarks.conv_problems import EDM2_PRESETS
from edm2ext import _library, tune
from edm2ext.ops import conv_choice
from edm2ext.ops.conv_choice import Problem
from python_train import plan

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def products(problem: Problem) -> int:
    """Multiply-adds."""
    taps = problem.kernel_height * problem.kernel_width
    return problem.batch * problem.height * problem.width * problem.channels * problem.out * taps


def least_bytes(problem: Problem) -> int:
    """What the fused operation must move: 16 bits an element, but the weight's gradient leaves in float32."""
    pixels = problem.batch * problem.height * problem.width
    weight = products(problem) // pixels
    images = problem.channels + problem.out
    if problem.follows == "sum":
        images += problem.out * (17 / 16 if problem.keep else 1)  # the mask: a bit an element
    elif problem.follows:
        images += problem.out * problem.keep
    elif problem.cat and problem.direction == 0:
        images += problem.channels  # MP-SiLU
    return round(2 * pixels * images) + weight * (4 if problem.direction == 2 else 2)


def rates(dtype: torch.dtype, flush: Tensor) -> tuple[float, float]:
    """Multiply-adds of a large matrix product, and bytes of a copy, in a millisecond."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    product = 8192**3 / tune.milliseconds(lambda: a @ a, flush)
    big = torch.empty(2**28, device="cuda", dtype=torch.float32)
    copy = 2 * 4 * big.numel() / tune.milliseconds(big.clone, flush)
    return product, copy


def compare(problem: Problem, gpu: tune.GPU, timer: tune.Timer, search: bool) -> dict[str, float | str]:
    """Milliseconds."""
    ours = tune.offers(problem, gpu)[:-1] if search else [[]]
    with contextlib.ExitStack() as stack:
        for other in conv_choice.alternatives(problem):  # to halves: a concatenation, and cuDNN
            stack.enter_context(conv_choice.trying(other, None))
        choice, times = tune.pick(problem, [*ours, None], timer)
    own = {name: time for name, time in times.items() if name != tune.TORCHS}
    best = min(own, key=own.__getitem__)
    bare = times[tune.TORCHS]
    if problem.follows or problem.cat:
        alone = problem._replace(follows="", keep=False, cat=0)
        bare = timer(alone, None)
    chosen = times[tune.name_of(choice)]
    return {"plan": best, "ours": own[best], "cuDNN": bare, "cuDNN+": times[tune.TORCHS], "chosen": chosen}


def rows(
    problems: Sequence[Problem], gpu: tune.GPU, timer: tune.Timer, search: bool, peak: tuple[float, float]
) -> Iterator[dict[str, str]]:
    """One a problem; peak: what `rates` measured."""
    for problem in problems:
        if problem.cat:
            problem = problem._replace(keep=False)  # the forward pass alone, as of the others
        found = compare(problem, gpu, timer, search)
        plan_name = found.pop("plan")
        ours = found["ours"]
        bound = max(products(problem) / peak[0], least_bytes(problem) / peak[1])
        yield {
            "problem": str(problem),
            "plan": str(plan_name),
            **{f"{name} ms": f"{time:.4f}" for name, time in found.items()},
            "TFLOP/s": f"{2 * products(problem) / ours / 1e9:.0f}",
            "of peak": f"{products(problem) / ours / peak[0]:.1%}",
            "cuDNN / ours": f"{found['cuDNN'] / ours:.3f}",
            "cuDNN+ / ours": f"{found['cuDNN+'] / ours:.3f}",
            "cuDNN+ / chosen": f"{found['cuDNN+'] / found['chosen']:.3f}",
            "bound / ours": f"{bound / ours:.3f}",
        }


def summary(found: Sequence[dict[str, str]]) -> Iterator[str]:
    """Geometric means of the ratios, and shares."""
    for column in ("cuDNN / ours", "cuDNN+ / ours", "cuDNN+ / chosen", "bound / ours"):
        values = [float(row[column]) for row in found]
        mean = math.exp(statistics.fmean(map(math.log, values)))
        reached = sum(value >= 1 for value in values) / len(values)
        yield f"{column}: geometric mean {mean:.3f}, least {min(values):.3f}, at least 1 on {reached:.0%}"


def save(file: Path, found: Sequence[dict[str, str]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, found[0].keys())
        writer.writeheader()
        writer.writerows(found)


@click.command(help=__doc__)
@click.option("--preset", "presets", multiple=True, type=click.Choice(EDM2_PRESETS), default=["img512-s"])
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=[32])
@click.option("--precision", type=click.Choice(list(_DTYPES)), default="fp16", show_default=True)
@click.option("--search", is_flag=True, help="Try what the tuner tries, and take the fastest.")
@click.option("--csv", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows to a file.")
def main(presets: tuple[str, ...], batches: tuple[int, ...], precision: str, search: bool, file: Path | None) -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks.conv needs a GPU; benchmarks.conv_problems predicts without one")
    if not _library.has_kernel("mp_conv2d", "cuda"):
        sys.exit(f"the library has no convolutions: {edm2ext.build_info()['build']}")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    timer, gpu = tune.Timer(), tune.gpu_at_hand()
    peak = rates(_DTYPES[precision], timer.flush)
    print(f"{gpu.name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {precision}")
    print(f"matrix product {2 * peak[0] / 1e9:.0f} TFLOP/s, copy {peak[1] / 1e9:.2f} TB/s\n")
    problems: dict[Problem, None] = {}
    for batch in batches:
        for preset in presets:
            problems |= dict.fromkeys(plan.convolutions_of_preset(preset, batch, precision))
    found = []
    for row in rows(list(problems), gpu, timer, search, peak):
        if not found:
            print("| " + " | ".join(row) + " |")
            print("|---|---|" + "---:|" * (len(row) - 2))
        found.append(row)
        print("| " + " | ".join(row.values()) + " |", flush=True)
        if file is not None:  # after each row: running out of time loses only what follows
            save(file, found)
    print("", *summary(found), sep="\n")


if __name__ == "__main__":
    main()
