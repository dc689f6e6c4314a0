"""Memory bandwidth that the CUDA kernels reach, beside a device copy and plain torch.

Bytes are those a kernel must move, each counted once; tensors are far larger than the L2 cache. Times are medians of
CUDA events.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from edm2ext import build_info, reference

EPS = 1e-4
SHAPE = (32, 192, 64, 64)  # the widest activations of EDM2-S at 512 x 512, times BATCHES
BATCHES = 8  # 400 MB in 16 bits


class Case(NamedTuple):
    """One kernel: what runs, what plain torch runs instead (None: nothing comparable), and the bytes it must move."""

    name: str
    native: Callable[[], object]
    plain: Callable[[], object] | None
    bytes: int


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def activation_cases(layout: torch.memory_format, dtype: torch.dtype) -> list[Case]:
    """The kernels on activations."""
    x = torch.randn((SHAPE[0] * BATCHES, *SHAPE[1:]), device="cuda", dtype=dtype).to(memory_format=layout)
    grad, grad_silu = torch.randn_like(x), torch.randn_like(x)
    c = torch.randn(x.shape[:2], device="cuda", dtype=dtype)
    size = x.numel() * x.element_size()
    native = torch.ops.edm2

    def backward(function: Callable[..., "Tensor | tuple[Tensor, ...]"], *inputs: Tensor) -> Callable[[], object]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        grads = (grad,) if isinstance(outputs, Tensor) else (grad, grad_silu)
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    def pixel_norm_silu(t: Tensor) -> "Tensor | tuple[Tensor, Tensor]":
        return reference.pixel_norm(t, EPS, silu=True)

    def modulated() -> Tensor:
        return reference.mp_silu_modulated(x, c)

    return [
        Case("pixel_norm", lambda: native.pixel_norm(x, EPS), lambda: reference.pixel_norm(x, EPS), 2 * size),
        Case("pixel_norm_silu", lambda: native.pixel_norm_silu(x, EPS), lambda: pixel_norm_silu(x), 3 * size),
        Case(
            "pixel_norm_backward",
            lambda: native.pixel_norm_backward(grad, x, EPS),
            backward(reference.pixel_norm, x),
            3 * size,
        ),
        Case(
            "pixel_norm_silu_backward",
            lambda: native.pixel_norm_silu_backward(grad, grad_silu, x, EPS),
            backward(pixel_norm_silu, x),
            4 * size,
        ),
        Case("mp_silu", lambda: native.mp_silu(x), lambda: reference.mp_silu(x), 2 * size),
        Case("mp_silu_backward", lambda: native.mp_silu_backward(grad, x), backward(reference.mp_silu, x), 3 * size),
        Case("mp_silu_modulated", lambda: native.mp_silu_modulated(x, c), modulated, 2 * size),
        Case(
            "mp_silu_modulated_backward",
            lambda: native.mp_silu_modulated_backward(grad, x, c),
            backward(reference.mp_silu_modulated, x, c),
            3 * size,
        ),
    ]


def ema_cases() -> list[Case]:
    """Two profiles over as many parameters as EDM2-S has (280 M), in tensors of its kind of sizes."""
    shapes = [(768, 768, 3, 3)] * 40 + [(384, 384, 3, 3)] * 50 + [(768, 768)] * 15 + [()] * 60
    params = [torch.randn(shape, device="cuda") for shape in shapes]
    emas = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    flat = [e for profile in emas for e in profile]
    size = 4 * sum(p.numel() for p in params)

    def plain() -> None:
        for profile, weight in zip(emas, (0.1, 0.2), strict=True):
            torch._foreach_lerp_(profile, params, weight)

    return [
        Case(
            "ema_update_ (beside _foreach_lerp_)",
            lambda: torch.ops.edm2.ema_update_(flat, params, [0.1, 0.2]),
            plain,
            5 * size,
        )
    ]


def copy_bandwidth() -> float:
    """Bytes read and written per millisecond by a copy of 1 GB."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / milliseconds(lambda: target.copy_(source))


def report(title: str, cases: list[Case], copy: float) -> None:
    """One table; copy is the bandwidth of a device copy in bytes per millisecond."""
    print(f"\n{title}\n| kernel | ms | TB/s | of copy | plain torch ms |\n|---|---|---|---|---|")
    for case in cases:
        time = milliseconds(case.native)
        plain = f"{milliseconds(case.plain):.3f}" if case.plain else ""
        rate = case.bytes / time
        print(f"| {case.name} | {time:.3f} | {rate / 1e9:.2f} | {100 * rate / copy:.0f} % | {plain} |")


def main() -> None:
    """Prints the tables, or why there are none."""
    info = build_info()
    if not info["cuda"] or not torch.cuda.is_available():
        print(f"not measured: {info['cuda_reason'] or 'torch sees no GPU'}")
        return
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; device copy {copy / 1e9:.2f} TB/s")
    for layout, name in ((torch.channels_last, "NHWC"), (torch.contiguous_format, "NCHW")):
        for dtype in (torch.float16, torch.float32):
            report(f"{name}, {dtype}", activation_cases(layout, dtype), copy)
            torch.cuda.empty_cache()
    report("EMA of 280 M parameters", ema_cases(), copy)


if __name__ == "__main__":
    main()
