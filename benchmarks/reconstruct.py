"""Many EMA lengths from many snapshots: our one pass, its limits on this machine, and what others do.

python -m benchmarks.reconstruct [--parameters 125e6] [--inputs 16] [--targets 49] [--cached] [--save FILE.md]

Files are made in a temporary folder and removed. Before each timing the inputs are dropped from the page cache, as far
as the system does so, or with --cached are left there, as an earlier look at them does; after it the outputs are on the
disk (fdatasync). The limits are measured in the same run:
reading all inputs and writing all outputs (through the system's cache and past it, whichever is faster), each alone
with as many threads as the pass has, and the multiply-adds alone, on numbers in the cache.
"""

from __future__ import annotations

import datetime
import json
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import edm2ext
from benchmarks.run import cpu_name
from edm2ext import ops
from edm2ext.phema import Reconstruction, open_average
from edm2ext.phema.stored import HEADER, PAGE, StoredTensor, layout_bytes, write_tensors

CHUNK, BLOCK, THREADS = 4 << 20, 8192, 8


def make_inputs(folder: Path, parameters: int, inputs: int) -> list[Path]:
    """Snapshots like those of a network: a few hundred tensors, most of the weights in large ones."""
    shapes, left = [], parameters
    while left > 0:
        size = min(left, [2_359_296, 1_327_104, 589_824, 147_456, 512, 1][len(shapes) % 6])
        shapes.append((f"layer{len(shapes):04d}.weight", torch.float16, (size,)))
        left -= size
    noise = torch.randn(4_000_037).half()
    paths = []
    for i in range(inputs):
        path = folder / f"network-snapshot-{i:07d}-{0.05 * (1 + i % 2):.3f}.safetensors"
        header = {"nimg": 2**23 * (1 + i // 2), "sigma_rel": 0.05 * (1 + i % 2)}
        repeated = (noise.roll(i)[: s[0]] for _, _, s in shapes)
        write_tensors(path, shapes, {HEADER: json.dumps(header)}, repeated)
        paths.append(path)
    return paths


def drop_from_cache(paths: Sequence[Path]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Took(NamedTuple):
    """Seconds on the clock, and of the processors by this process (the system's share for its files included)."""

    clock: float
    processor: float


def seconds(work: Callable[[], object], inputs: Sequence[Path] = ()) -> Took:
    drop_from_cache(inputs)
    start, used = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - start, time.process_time() - used)


def read_all(paths: Sequence[Path]) -> None:
    def read(path: Path) -> None:
        buffer = memoryview(bytearray(CHUNK))
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, paths))


def write_all(folder: Path, count: int, size: int, flags: int) -> None:
    """Files of the size, rounded up to a page. flags: O_DIRECT, or 0 for writing through the system's cache."""
    content = mmap.mmap(-1, CHUNK)  # starts with a page
    content[:] = np.random.default_rng(0).bytes(CHUNK)
    view, size = memoryview(content), size + -size % PAGE

    def write(i: int) -> None:
        file = os.open(folder / str(i), os.O_WRONLY | os.O_CREAT | flags)
        os.posix_fallocate(file, 0, size)
        for at in range(0, size, CHUNK):
            os.pwrite(file, view[: min(CHUNK, size - at)], at)
        os.fdatasync(file)
        os.close(file)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, range(count)))


def read_and_write(paths: Sequence[Path], folder: Path, count: int, size: int) -> None:
    """At the same time: what the disk alone would take."""
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(read_all, paths)
        write_all(folder, count, size, os.O_DIRECT)
        reading.result()


def multiply_add(inputs: int, coefs: Tensor, numel: int, by_op: bool) -> None:
    """The sums alone, by the op or by torch.mm, of numbers that stay in the caches. As many threads as torch has do a
    share each, none waits for another."""
    matrix, workers = coefs.t().float().contiguous(), torch.get_num_threads()

    def share(_: int) -> None:
        torch.set_num_threads(1)
        pieces = [torch.randn(BLOCK).half() for _ in range(inputs)]
        total, wide = torch.zeros(coefs.shape[1], BLOCK), torch.empty(inputs, BLOCK)
        for _ in range(max(1, numel // (BLOCK * workers))):
            if by_op:
                ops.accumulate_snapshots(pieces, coefs, total)
            else:
                for row, piece in zip(wide, pieces, strict=True):
                    row.copy_(piece)
                torch.mm(matrix, wide, out=total)

    try:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(share, range(workers)))
    finally:
        torch.set_num_threads(workers)


def by_tiled_mm(paths: Sequence[Path], coefs: Tensor, outputs: Sequence[Path], tile: int = 1 << 18) -> None:
    """The plain way: tiles of all inputs by memory map, torch.mm, and writes at the outputs' offsets, in turn."""
    layout = [(name, t.dtype, t.shape) for name, t in open_average(paths[0]).tensors.items()]
    head, _, size = layout_bytes(layout, {})
    sources = [np.memmap(path, np.float16, "r", offset=_first_byte(path)) for path in paths]
    matrix = coefs.t().float().contiguous()
    files = [open(path, "wb", buffering=0) for path in outputs]  # noqa: SIM115
    for file in files:
        os.posix_fallocate(file.fileno(), 0, size)
        file.write(head)
    for at in range(0, len(sources[0]), tile):
        rows = torch.stack([torch.from_numpy(source[at : at + tile].astype(np.float32)) for source in sources])
        results = torch.mm(matrix, rows).half().numpy()
        for file, row in zip(files, results, strict=True):
            file.write(row)
    for file in files:
        os.fdatasync(file.fileno())
        file.close()


def _first_byte(path: Path) -> int:
    return min(t.start for t in open_average(path).tensors.values() if isinstance(t, StoredTensor))


def by_loop(paths: Sequence[Path], coefs: Tensor, output: Path) -> None:
    """What peers do for each target: load every snapshot, add it up tensor by tensor, save."""
    from safetensors.torch import save_file

    total: dict[str, Tensor] = {}
    for path, coef in zip(paths, coefs.tolist(), strict=True):
        for name, value in load_file(path).items():
            part = value.to(torch.float32) * coef
            total[name] = part if name not in total else total[name].add_(part)
    save_file({name: value.half() for name, value in total.items()}, output)
    with open(output, "rb") as file:
        os.fdatasync(file.fileno())


def check(ours: Sequence[Path], theirs: Sequence[Path]) -> None:
    """Both ways made the same networks, to the rounding of float16."""
    for one, other in ((ours[0], theirs[0]), (ours[-1], theirs[-1])):
        a, b = load_file(one), load_file(other)
        for name in list(a)[:: max(1, len(a) // 10)]:
            torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-3)


@click.command(help=__doc__)
@click.option("--parameters", default=125e6, show_default=True, help="Of the network.")
@click.option("--inputs", default=16, show_default=True, help="Snapshots.")
@click.option("--targets", default=49, show_default=True, help="EMA lengths, 0.010 to 0.250.")
@click.option("--rounds", default=1, show_default=True, help="Repetitions; of each timing the least counts.")
@click.option("--loops", default=2, show_default=True, help="Targets that the per-target loop is timed on.")
@click.option("--cached", is_flag=True, help="Leave the inputs in the system's cache.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to put the files.  [default: a temporary one]")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Also write the table to this file.")
def main(
    parameters: float,
    inputs: int,
    targets: int,
    rounds: int,
    loops: int,
    cached: bool,
    folder: Path | None,
    save: Path | None,
) -> None:
    scratch = Path(tempfile.mkdtemp(dir=folder))
    try:
        lines = _run(scratch, round(parameters), inputs, targets, rounds, loops, cached)
    finally:
        shutil.rmtree(scratch)
    click.echo("\n".join(lines))
    if save is not None:
        save.write_text("\n".join([*lines, ""]), encoding="utf-8")


def _run(scratch: Path, parameters: int, inputs: int, targets: int, rounds: int, loops: int, cached: bool) -> list[str]:
    size = 2 * parameters
    need = (inputs + 2 * targets) * size
    if shutil.disk_usage(scratch).free < 1.1 * need:
        raise click.ClickException(f"{need / 1e9:.0f} GB are needed in {scratch}; take fewer --targets or --parameters")
    paths = make_inputs(scratch, parameters, inputs)
    work = Reconstruction([open_average(path) for path in paths], np.linspace(0.01, 0.25, targets).tolist())
    coefs = work.combination.coefs[0]
    times: dict[str, list[Took]] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        times.setdefault(name, []).append(seconds(action, () if cached else paths))

    read_all(paths)
    for _ in range(rounds):
        timed("read", lambda: read_all(paths))
        for flags in (0, os.O_DIRECT):
            (scratch / "limit").mkdir()
            timed("write", lambda flags=flags: write_all(scratch / "limit", targets, size, flags))
            shutil.rmtree(scratch / "limit")
        (scratch / "limit").mkdir()
        timed("both", lambda: read_and_write(paths, scratch / "limit", targets, size))
        shutil.rmtree(scratch / "limit")
        sums = [seconds(lambda by_op=by_op: multiply_add(inputs, coefs, parameters, by_op)) for by_op in (True, False)]
        times.setdefault("multiply-add", []).append(min(sums))
        ours = [scratch / "ours" / f"{m}.safetensors" for m in range(targets)]
        timed("one pass", lambda ours=ours: work.to_files(ours, threads=THREADS))
        theirs = [scratch / f"mm{m}.safetensors" for m in range(targets)]
        timed("tiled torch.mm", lambda theirs=theirs: by_tiled_mm(paths, coefs, theirs))
        check(ours, theirs)
        shutil.rmtree(scratch / "ours")
        for path in theirs:
            path.unlink()
    for m in range(loops):
        timed("loop, one target", lambda m=m: by_loop(paths, coefs[:, m], scratch / "loop.safetensors"))
    best = {name: Took(*map(min, zip(*found, strict=True))) for name, found in times.items()}
    limits = [best[name] for name in ("read", "write", "multiply-add")]
    slowest, needed = max(limit.clock for limit in limits), sum(limit.processor for limit in limits)
    loop = Took(*(targets * value for value in best["loop, one target"]))
    rows = [
        (f"limit: reading {inputs * size / 1e9:.1f} GB", best["read"]),
        (f"limit: writing {targets * size / 1e9:.1f} GB", best["write"]),
        (f"limit: {inputs * targets * parameters / 1e9:.0f} G multiply-adds", best["multiply-add"]),
        ("reading and writing at the same time", best["both"]),
        ("**one pass** (`Reconstruction.to_files`)", best["one pass"]),
        ("tiled `torch.mm`, memory-mapped inputs", best["tiled torch.mm"]),
        (f"a loop for each target, {targets} × {best['loop, one target'].clock:.1f} s", loop),
    ]
    ours = best["one pass"]
    info, where = edm2ext.build_info(), "in the cache" if cached else "dropped from the cache"
    load = os.getloadavg()
    return [
        f"{datetime.date.today()}, {cpu_name()}, {os.cpu_count()} processors, load average {load[0]:.1f}, "
        f"{torch.get_num_threads()} threads of sums and {THREADS} that read and write, kernels: {info['cpu_isa']}, "
        f"torch {torch.__version__}",
        "",
        f"`python -m benchmarks.reconstruct`: {targets} EMA lengths from {inputs} float16 snapshots of "
        f"{parameters / 1e6:.0f} M parameters, {where}, least of {rounds}.",
        "",
        "| | seconds | of the slowest limit's speed | processor seconds | of the three limits' together | one pass is "
        "faster by | with less processor time by |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {took.clock:.1f} | {100 * slowest / took.clock:.0f} % | {took.processor:.1f} | "
            f"{100 * needed / took.processor:.0f} % | {took.clock / ours.clock:.2f}× | "
            f"{took.processor / ours.processor:.2f}× |"
            for name, took in rows
        ),
    ]


if __name__ == "__main__":
    main()
