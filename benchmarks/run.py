"""Native against plain torch on the CPU: every op, and the whole training step, alternating in one process.

python -m benchmarks.run [--only TEXT] [--threads 2] [--clock wall] [--save FILE.md]
"""

import datetime
import itertools
import platform
from pathlib import Path

import click
import torch

import edm2ext
from benchmarks import op_cases, step_cases
from benchmarks.timing import CLOCKS, Comparison, compare


def cpu_name() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def measure(case: op_cases.Case, rounds: int, block_seconds: float, clock: str) -> Comparison:
    def under(backend: str, work: op_cases.Work) -> op_cases.Work:
        def run() -> None:
            with edm2ext.set_backend(backend):
                work()

        return run

    baseline = under("reference", case.plain or case.work)
    native = under("native", case.work)
    return compare(baseline, native, rounds=rounds, block_seconds=block_seconds, clock=CLOCKS[clock])


@click.command(help=__doc__)
@click.option("--only", default="", metavar="TEXT", help="Only rows whose name contains TEXT.")
@click.option("--rounds", default=15, show_default=True, help="Rounds per row; each times both backends once.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="Threads for both backends.")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", show_default=True, help="What is measured.")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Also write the table to this file.")
def main(only: str, rounds: int, threads: int, clock: str, save: Path | None) -> None:
    torch.set_num_threads(threads)
    info = edm2ext.build_info()
    lines = [
        f"{datetime.date.today()}, {cpu_name()}, {threads} threads, "
        f"kernels: {info['cpu_isa']}, torch {torch.__version__}",
        "",
        f"`python -m benchmarks.run --rounds {rounds} --threads {threads} --clock {clock}`: median time of a call; the "
        "ratio is the median over alternating rounds.",
        "",
        "| row | plain torch, µs | native, µs | speed-up |",
        "|---|---:|---:|---:|",
    ]
    click.echo("\n".join(lines))
    slower = []
    cases = itertools.chain(op_cases.all_cases(step_cases.network_weights()), step_cases.all_cases())
    for case in cases:
        if only not in case.name:
            continue
        result = measure(case, rounds, block_seconds=0.02, clock=clock)
        row = f"| {case.name} | {result.baseline * 1e6:.1f} | {result.candidate * 1e6:.1f} | {result.speedup:.2f}× |"
        lines.append(row)
        click.echo(row)
        if result.speedup < 1:
            slower.append(case.name)
    summary = f"\n{len(lines) - 6} rows; native slower on {len(slower)}" + (": " + "; ".join(slower) if slower else "")
    click.echo(summary)
    if save is not None:
        save.write_text("\n".join([*lines, summary, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
