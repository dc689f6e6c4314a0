"""One training step by op on the GPU at hand: its time, and what of it neither bytes nor arithmetic explain.

python -m benchmarks.gpu_profile [--preset img512-s] [--batch 32] [--json FILE] [--dry-run]

The time of an op is that of the kernels that ran for it. Its floor is the larger of the bytes it must move over the
measured rate of a copy, and its flops over the measured rate of a matrix product; both are counted on meta tensors
(`benchmarks/traffic.py`). The gap between them is what a perfect kernel would save. The rest of the step's wall time,
in which the GPU waits for the host, is a row of its own. A second table lists the kernels. --dry-run profiles a tiny
network on the CPU, without times.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.conv import rates
from benchmarks.gpu_step import make_trainer, on_gpu
from benchmarks.traffic import count_step
from edm2ext.traffic import Counter, Traffic
from python_train.config import PRESETS
from python_train.trainer import COMPUTE_DTYPES

_STEPS = 3
WAITING = "the GPU waits for the host"


@dataclass
class Row:
    """An op in all phases of a step; None where it was not measured."""

    op: str
    calls: int
    launches: int
    gb: float
    gflop: float = 0.0
    ms: float | None = None
    floor_ms: float | None = None
    gap_ms: float | None = None


def _name_of(op: str) -> str:
    """One name for an op, whichever of its kernels torch takes."""
    if op.startswith("_scaled_dot_product"):
        return "attention_backward" if op.endswith("backward") else "attention"
    return op


def count_by_op(counter: Counter) -> dict[str, Traffic]:
    """Traffic by the name of the op that a profiler shows; what a native op calls of torch is the native op's."""
    counted: dict[str, Traffic] = {}
    for key, row in counter.rows.items():
        op = _name_of(key.op.split(" in ")[-1])
        counted[op] = counted.get(op, Traffic()) + row
    return counted


def flops_by_op(preset: str, batch: int) -> tuple[Counter, dict[str, int]]:
    """What a step moves, and its flops."""
    with FlopCounterMode(display=False) as flops:
        counter = count_step(preset, batch)
    by_op: dict[str, int] = defaultdict(int)
    for op, count in flops.get_flop_counts()["Global"].items():
        by_op[_name_of(str(op).split(".")[-1])] += count // 2  # count_step takes two steps
    return counter, dict(by_op)


def outermost(events: Iterable[Any], ops: set[str]) -> Iterator[tuple[str, Any]]:
    """(op, event) for the profiled calls of the ops that no other of them made."""

    def op_of(event: Any) -> str | None:
        name = _name_of(event.name.split("::")[-1])
        return name if event.name.startswith(("aten::", "edm2::")) and name in ops else None

    for event in events:
        op = op_of(event)
        parent = event.cpu_parent
        while op is not None and parent is not None:
            op = None if op_of(parent) is not None else op
            parent = parent.cpu_parent
        if op is not None:
            yield op, event


def ops_table(
    events: Iterable[Any],
    counted: dict[str, Traffic],
    flops: dict[str, int],
    steps: int,
    rate: tuple[float, float] | None,
) -> list[Row]:
    """Rows of one step, the largest gap first. `rate`: flops and bytes in a millisecond."""
    calls: dict[str, int] = defaultdict(int)
    micros: dict[str, float] = defaultdict(float)
    for op, event in outermost(events, counted.keys() | flops.keys()):
        calls[op] += 1
        micros[op] += event.device_time_total
    rows = []
    for op in sorted(counted.keys() | calls.keys()):
        moved = counted.get(op, Traffic())
        row = Row(op, calls[op] // steps, moved.launches, moved.bytes / 1e9, flops.get(op, 0) / 1e9)
        if rate is not None:
            row.ms = micros[op] / 1e3 / steps
            row.floor_ms = max(flops.get(op, 0) / rate[0], moved.bytes / rate[1])
            row.gap_ms = row.ms - row.floor_ms
        rows.append(row)
    return sorted(rows, key=lambda row: (-(row.gap_ms or 0.0), -row.gb))


def kernels_table(events: Iterable[Any], steps: int) -> list[dict[str, Any]]:
    """Time of each kernel in a step."""
    micros: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in on_gpu(events):
        micros[event.name] += event.device_time_total
        calls[event.name] += 1
    order = sorted(micros, key=lambda name: -micros[name])
    return [
        {"kernel": name[:120], "launches": calls[name] // steps, "ms": micros[name] / 1e3 / steps} for name in order
    ]


@click.command(help=__doc__)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="img512-s", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option("--top", default=25, show_default=True, help="Rows to print of each table.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Also write every row to this file."
)
@click.option("--dry-run", is_flag=True, help="A tiny network on the CPU, without times.")
def main(preset: str, batch: int, top: int, file: Path | None, dry_run: bool) -> None:
    if dry_run:
        preset, batch = "digits", 2
    elif not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_profile needs a GPU; --dry-run does without one")
    device = torch.device("cpu" if dry_run else "cuda")
    try:
        counter, flops = flops_by_op(preset, batch)
    except RuntimeError as error:
        sys.exit(f"benchmarks.gpu_profile: {error}")
    trainer, step = make_trainer(preset, batch, device)
    for _ in range(1 if dry_run else 5):
        step()
    rate, wall_ms = None, None
    if not dry_run:
        flush = torch.empty(2**27, device=device, dtype=torch.float32)
        product_rate, copy_rate = rates(COMPUTE_DTYPES[trainer.options.precision], flush)
        rate = 2 * product_rate, copy_rate
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_STEPS):
            step()
        end.record()
        end.synchronize()
        wall_ms = start.elapsed_time(end) / _STEPS
    activities = [ProfilerActivity.CPU] + ([] if dry_run else [ProfilerActivity.CUDA])
    with profile(activities=activities, acc_events=True) as seen:
        for _ in range(_STEPS):
            step()
        if not dry_run:
            torch.cuda.synchronize()
    events = seen.events()
    rows = ops_table(events, count_by_op(counter), flops, _STEPS, rate)
    kernels = kernels_table(events, _STEPS)
    if wall_ms is not None:
        busy = sum(kernel["ms"] for kernel in kernels)
        waiting = max(wall_ms - busy, 0.0)
        rows.append(Row(WAITING, 0, 0, 0.0, 0.0, waiting, 0.0, waiting))
        rows.sort(key=lambda row: -(row.gap_ms or 0.0))
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {preset}, batch {batch}")
        print(f"a step takes {wall_ms:.2f} ms, its kernels {busy:.2f} ms; {_rates_text(rate)}")
        print("the three largest gaps: " + "; ".join(f"{row.op} {row.gap_ms:.2f} ms" for row in rows[:3]))
    _print_table([asdict(row) for row in rows[:top]])
    _print_table(kernels[:top])
    if file is not None:
        facts = {"preset": preset, "batch": batch, "wall_ms": wall_ms, "flops_and_bytes_per_ms": rate}
        found = {**facts, "ops": [asdict(row) for row in rows], "kernels": kernels}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _rates_text(rate: tuple[float, float] | None) -> str:
    return "" if rate is None else f"matrix product {rate[0] / 1e9:.0f} TFLOP/s, copy {rate[1] / 1e9:.2f} TB/s"


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    print("\n| " + " | ".join(rows[0]) + " |\n|---|" + "---:|" * (len(rows[0]) - 1))
    for row in rows:
        cells = ("not measured" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
