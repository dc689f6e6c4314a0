"""Memory bandwidth that the ops reach on a GPU, beside a device copy, plain torch and torch.compile.

python -m benchmarks.gpu_bandwidth [--minutes 6] [--only TEXT] [--json FILE] [--dry-run]

Bytes are those that the native launchers declare, each counted once (benchmarks/traffic.py); tensors are random, and
far larger than the L2 cache. Times are medians of CUDA events; plain torch and the compiled reference do the same work.
Without a GPU the table says "not measured"; --dry-run runs every case on tiny tensors of the CPU, untimed.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from benchmarks.traffic import Traffic, counting
from edm2ext import build_info, ops, reference, set_backend
from python_train.config import make_options
from python_train.network import Precond

Function = Callable[..., Any]
Work = Callable[[], object]
_HEAD_START = 1_000_000  # cycles, about half a millisecond: longer than the host needs for the backward of an op


class Case(NamedTuple):
    """One op: the native function, the same in plain torch, and its inputs. `backward`: time that too."""

    name: str
    native: Function
    plain: Function
    inputs: tuple[Any, ...]
    backward: bool = True


class Row(NamedTuple):
    """What was measured: milliseconds; None where it was not."""

    name: str
    launches: int
    bytes: int
    native: float | None
    plain: float | None
    compiled: float | None
    note: str = ""


# ---- cases ----


def activation_cases(layout: torch.memory_format, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The widest activations of EDM2-S at 512 x 512, 400 MB of them."""
    batch = {"cpu": 2}.get(device, 128 if dtype == torch.float32 else 256)
    side = 4 if device == "cpu" else 64

    def image(channels: int = 192, size: int = side) -> Tensor:
        shape = (batch, channels, size, size)
        return torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout)

    label = f", {'NHWC' if layout == torch.channels_last else 'NCHW'}, {str(dtype).removeprefix('torch.')}"
    x, y, small = image(), image(), image(size=side // 2)
    c = torch.randn(batch, 192, device=device, dtype=dtype)
    yield Case("pixel_norm" + label, ops.pixel_norm, reference.pixel_norm, (x,))
    silu = {"silu": True}
    yield Case(
        "pixel_norm + mp_silu" + label, partial(ops.pixel_norm, **silu), partial(reference.pixel_norm, **silu), (x,)
    )
    yield Case("mp_silu" + label, ops.mp_silu, reference.mp_silu, (x,))
    yield Case("mp_silu_modulated" + label, ops.mp_silu_modulated, reference.mp_silu_modulated, (x, c))
    clip = {"t": 0.3, "clip": 256.0}
    yield Case("mp_sum, clipped" + label, partial(ops.mp_sum, **clip), partial(reference.mp_sum, **clip), (x, y))
    yield Case("mp_cat + mp_silu" + label, partial(ops.mp_cat, **silu), partial(reference.mp_cat, **silu), (x, y))
    yield Case("resample_down" + label, ops.resample_down, reference.resample_down, (x,))
    yield Case("resample_up" + label, ops.resample_up, reference.resample_up, (small,))
    heads = partial(ops.cosine_attention, num_heads=3), partial(reference.cosine_attention, num_heads=3)
    yield Case("cosine_attention, 16 x 16" + label, *heads, (image(576, side // 4),))


def network_cases(preset: str, device: str) -> Iterator[Case]:
    """Passes over all weights of a network."""
    options = make_options("digits" if device == "cpu" else preset)
    with torch.device("meta"):
        net = Precond(**options.network_config(64, 4, 1000))
    shapes = [p.shape for p in net.parameters()]
    params = [torch.randn(shape, device=device) for shape in shapes]
    weights = [p for p in params if p.dim() > 1]
    gain = torch.tensor(0.9, device=device)
    label = f", {preset}"
    half = {"gain": gain, "dtype": torch.float16}
    yield Case(
        "effective_weight of all layers" + label,
        lambda *w: ops.effective_weight(list(w), **half),
        lambda *w: reference.effective_weight(list(w), **half),
        tuple(weights),
    )
    yield Case("force_normalize_" + label, ops.force_normalize_, reference.force_normalize_, (weights,), backward=False)
    emas = [[torch.zeros_like(p) for p in params] for _ in range(2)]

    def foreach(emas: list[list[Tensor]], params: list[Tensor], one_minus_betas: Sequence[float]) -> None:
        for profile, weight in zip(emas, one_minus_betas, strict=True):
            torch._foreach_lerp_(profile, params, weight)

    yield Case(
        "ema_update_, 2 profiles, beside _foreach_lerp_" + label,
        ops.ema_update_,
        foreach,
        (emas, params, [0.1, 0.2]),
        backward=False,
    )


def snapshot_cases(device: str) -> Iterator[Case]:
    numel = 1 << (10 if device == "cpu" else 26)
    inputs = [torch.randn(numel, device=device).half() for _ in range(8)]
    coefs = torch.randn(8, 6, dtype=torch.float64).numpy()
    yield Case(
        "accumulate_snapshots, 8 to 6", ops.accumulate_snapshots, reference.accumulate_snapshots, (inputs, coefs), False
    )


def all_cases(device: str) -> Iterator[Case]:
    for layout in (torch.channels_last, torch.contiguous_format):
        for dtype in (torch.float16, torch.float32):
            yield from activation_cases(layout, dtype, device)
    for preset in ("img512-s", "img512-xxl"):
        yield from network_cases(preset, device)
    yield from snapshot_cases(device)


# ---- measuring ----


def milliseconds(work: Work, seconds: float = 1.0) -> float:
    """Median time of one call, of 20 or as many as fit. The GPU is kept busy while the host queues the call, and does
    not wait for it in between."""
    for _ in range(3):
        work()
    times: list[float] = []
    end_time = time.monotonic() + seconds
    while len(times) < 3 or (len(times) < 20 and time.monotonic() < end_time):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_HEAD_START)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def untimed(work: Work) -> None:
    work()


def copy_bandwidth() -> float:
    """Bytes read and written per millisecond by a copy of 1 GB."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / milliseconds(lambda: target.copy_(source))


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return [_map(item, function) for item in value] if isinstance(value, list) else value


def _on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta", requires_grad=x.requires_grad)


def _tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def forward_work(function: Function, inputs: tuple[Any, ...]) -> Work:
    def work() -> object:
        with torch.no_grad():
            return function(*inputs)

    return work


def backward_work(function: Function, inputs: tuple[Any, ...]) -> Work:
    """The backward pass alone, over and over."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = _tensors(function(*leaves))
    grads = [torch.empty_like(out) if out.is_meta else torch.randn_like(out) for out in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def declared(case: Case, work: Callable[[Function, tuple[Any, ...]], Work]) -> tuple[Traffic, str]:
    """What the native call moves, and a note if native kernels serve none or not all of it."""
    inputs = tuple(_map(value, _on_meta) for value in case.inputs)
    call = work(partial(_with_native, case.native), inputs)
    with counting() as counter:
        call()
    native, whole = counter.total(kind="native"), counter.total()
    if native.launches == 0:
        return whole, "no native kernel"
    products = counter.total(kind="product").launches
    return whole, f"with {products} products" if products else ""


def _with_native(function: Function, *inputs: Any) -> Any:
    with set_backend("native"):
        return function(*inputs)


def measure(case: Case, timer: Callable[[Work], float | None], compile_too: bool) -> Iterator[Row]:
    """Forward and backward of one case. What fails is named in the row's note."""
    for name, work in [("forward", forward_work), ("backward", backward_work)][: 1 + case.backward]:
        times: dict[str, float | None] = {}
        try:
            traffic, note = declared(case, work)
        except Exception as error:
            traffic, note = Traffic(), f"count failed: {_first_line(error)}"
        functions = {"native": partial(_with_native, case.native), "plain": case.plain}
        if compile_too and case.backward:
            functions["compiled"] = torch.compile(case.plain, dynamic=False)
        for kind, function in functions.items():
            try:
                times[kind] = timer(work(function, case.inputs))
            except Exception as error:  # noqa: PERF203 - the others may work
                note += f" {kind} failed: {_first_line(error)}"
        row = (times.get(kind) for kind in ("native", "plain", "compiled"))
        yield Row(f"{case.name}, {name}", traffic.launches, traffic.bytes, *row, note.strip())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def line(row: Row, copy: float | None) -> str:
    def cell(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.3f}"

    rate = row.bytes / row.native if row.native else None
    of_copy = f"{100 * rate / copy:.0f} %" if rate and copy else "not measured"
    tera = cell(rate and rate / 1e9)
    cells = (row.name, row.launches, f"{row.bytes / 1e6:.0f}", cell(row.native), tera, of_copy)
    return "| " + " | ".join(map(str, (*cells, cell(row.plain), cell(row.compiled), row.note))) + " |"


HEADER = """| op | launches | MB | ms | TB/s | of copy | plain torch, ms | torch.compile, ms | |
|---|---:|---:|---:|---:|---:|---:|---:|---|"""


@click.command(help=__doc__)
@click.option("--minutes", default=6.0, show_default=True, help="Start no further case after this time.")
@click.option("--only", default="", metavar="TEXT", help="Only cases whose name contains TEXT.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows to this file."
)
@click.option("--dry-run", is_flag=True, help="Run every case on tiny CPU tensors, untimed.")
def main(minutes: float, only: str, file: Path | None, dry_run: bool) -> None:
    info = build_info()
    measurable = bool(info["cuda"]) and torch.cuda.is_available()
    if not measurable:
        print(f"not measured: {info['cuda_reason'] or 'torch sees no GPU'}")
        if not dry_run:
            return
    deadline = time.monotonic() + 60 * minutes
    on_gpu = measurable and not dry_run
    timer = milliseconds if on_gpu else untimed
    copy = copy_bandwidth() if on_gpu else None
    if on_gpu:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; device copy {copy / 1e9:.2f} TB/s\n")
    print(HEADER)
    rows: list[Row] = []
    for case in all_cases("cuda" if on_gpu else "cpu"):
        if only not in case.name:
            continue
        if time.monotonic() > deadline:
            print(f"| {case.name} | not measured: out of time |")
            continue
        for row in measure(case, timer, compile_too=on_gpu and "NHWC, float16" in case.name):
            rows.append(row)
            print(line(row, copy), flush=True)
            if file is not None:  # after each row: a crash loses only what follows
                found = {"copy_bytes_per_ms": copy, "rows": [row._asdict() for row in rows]}
                file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        del case
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
