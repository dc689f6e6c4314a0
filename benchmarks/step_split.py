"""Where the time of a training step on the CPU goes: convolutions by direction, all other ops, and what lies between.

python -m benchmarks.step_split [--rounds 9] [--save FILE.md]

The steps are those of `benchmarks.run`, plain torch's and ours, in fp32 and, where the CPU multiplies it, in bf16; in
turns, in one thread and its processor time, which a busy machine disturbs less than the clock. Ops are timed
one by one where they are dispatched; overhead is what is left of a step in which nobody times them: Python, autograd,
the dispatcher. Reorders, by which oneDNN brings weights into the layout of its convolutions, are the part of the
convolutions' time that its own report gives them. Medians of so many steps; ratios are medians over rounds.
"""

import collections
import contextlib
import ctypes
import datetime
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import edm2ext
from benchmarks import step_cases
from benchmarks.run import cpu_name
from benchmarks.step_cases import Steps

aten = torch.ops.aten
CONVOLUTIONS = ("forward", "grad x", "grad w")
PARTS = (*CONVOLUTIONS, "other ops", "overhead")


class _Clock(TorchDispatchMode):
    """Milliseconds by part, in every op within. A convolution's two gradients are computed one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.convolution.default:
            return self._timed("forward", func, *args, **kwargs)
        if func is aten.convolution_backward.default:
            needs_x, needs_w, _ = args[-1]
            grad_x = self._timed("grad x", func, *args[:-1], [True, False, False])[0] if needs_x else None
            grad_w = self._timed("grad w", func, *args[:-1], [False, True, False])[1] if needs_w else None
            return grad_x, grad_w, None
        is_gradient = func._opname == "conv_weight_grad"
        return self._timed("grad w" if is_gradient else "other ops", func, *args, **kwargs)

    def _timed(self, part: str, func: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        result = func(*args, **kwargs)
        self.parts[part] += 1e3 * (time.thread_time() - started)
        return result


@contextlib.contextmanager
def _standard_output_of_c(file: IO[str]) -> Iterator[None]:
    """What C code prints within goes to the file."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept = os.dup(1)
    os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def share_of_reorders(report: str) -> float:
    """Of the time that oneDNN's verbose mode reports for convolutions and reorders."""
    took: collections.Counter[str] = collections.Counter()
    for line in report.splitlines():
        words = line.split(",")
        if "exec" in words[:4]:
            took[words[5]] += float(words[-1])
    return took["reorder"] / ((took["convolution"] + took["reorder"]) or 1)


def reorders(step: Callable[[], object]) -> float:
    """Their share in a step."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        with _standard_output_of_c(file), torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            step()
        file.seek(0)
        return share_of_reorders(file.read())


def split(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one step by part, and its "total"."""
    started = time.thread_time()
    step()
    total = 1e3 * (time.thread_time() - started)
    with _Clock() as clock:
        step()
    return {**clock.parts, "overhead": total - sum(clock.parts.values()), "total": total}


def table(name: str, networks: list[Steps], rounds: int) -> Iterator[str]:
    """Markdown: for every precision a row for plain torch and one for ours."""
    sides: dict[tuple[str, str], Callable[[], object]] = {}
    for each in networks:
        sides |= {("plain torch", each.precision): each.plain, ("ours", each.precision): each.native}
    found: dict[tuple[str, str], list[dict[str, float]]] = {side: [] for side in sides}
    reordering: dict[tuple[str, str], float] = {}
    for index in range(rounds + 1):
        for side, work in sides.items():
            with edm2ext.set_backend("reference" if side[0] == "plain torch" else "native"):
                if index == 0:
                    work()  # makes the state of the optimizer
                    reordering[side] = reorders(work)
                else:
                    found[side].append(split(work))
    yield f"training step, {name}, {networks[0].params / 1e6:.2f} M parameters, milliseconds:\n"
    yield "| | " + " | ".join((*PARTS, "total", "reorders, of convolutions")) + " |"
    yield "|---|" + "---:|" * (len(PARTS) + 2)
    for side, splits in found.items():
        medians = {part: statistics.median(s[part] for s in splits) for part in (*PARTS, "total")}
        cells = [f"{medians[part]:.1f} ({medians[part] / medians['total']:.1%})" for part in PARTS]
        total = f"{medians['total']:.1f}"
        yield f"| {', '.join(side)} | " + " | ".join([*cells, total, f"{reordering[side]:.1%}"]) + " |"
    yield ""
    for plain, ours in itertools.combinations_with_replacement((each.precision for each in networks), 2):
        pairs = zip(found["plain torch", plain], found["ours", ours], strict=True)
        ratio = statistics.median(p["total"] / o["total"] for p, o in pairs)
        yield f"plain torch in {plain} / ours in {ours}: {ratio:.2f}\n"


@click.command(help=__doc__)
@click.option("--rounds", default=9, show_default=True)
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Also write the tables to this file.")
def main(rounds: int, save: Path | None) -> None:
    torch.set_num_threads(1)
    isa = edm2ext.build_info()["cpu_isa"]
    lines = [
        f"{datetime.date.today()}, {cpu_name()}, 1 thread, kernels: {isa}, torch {torch.__version__}",
        "",
        f"`python -m benchmarks.step_split --rounds {rounds}`",
        "",
    ]
    for name, networks in step_cases.all_steps():
        lines += table(name, networks, rounds)
    click.echo("\n".join(lines))
    if save is not None:
        save.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
