"""What `benchmarks.run` times at the level of single ops: every function of `edm2ext.ops` on the shapes EDM2 uses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import edm2ext
from edm2ext import ops
from edm2ext.ops.accumulate_snapshots import sum_snapshots
from edm2ext.optim import FusedAdam
from edm2ext.phema import PowerEMA

Work = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row: `work` is run under each backend in turn; or `plain`, if given, instead of it under "reference"."""

    name: str
    work: Work
    plain: Work | None = None


def forward(function: Callable[..., object], *args: object) -> Work:
    def run() -> object:
        with torch.no_grad():
            return function(*args)

    return run


def forward_backward(function: Callable[..., object], *args: object) -> Work:
    """Forward and backward with gradients for every floating-point argument; the incoming gradient is drawn once."""
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    wanted = [a for a in leaves if isinstance(a, Tensor)]

    def outputs() -> list[Tensor]:
        result = function(*leaves)
        return list(result) if isinstance(result, tuple) else [result]

    grads = [torch.randn_like(out) for out in outputs()]

    def run() -> object:
        return torch.autograd.grad(outputs(), wanted, grads)

    return run


def both_directions(name: str, function: Callable[..., object], *args: object) -> Iterator[Case]:
    yield Case(f"{name}, forward", forward(function, *args))
    yield Case(f"{name}, forward + backward", forward_backward(function, *args))


def activation(n: int, channels: int, size: int, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.randn(n, channels, size, size).to(dtype).to(memory_format=layout)


def activation_cases(
    n: int, channels: int, size: int, dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[Case]:
    label = (
        f"{n}×{channels}×{size}×{size} {str(dtype).split('.')[1]} {'NHWC' if layout == torch.channels_last else 'NCHW'}"
    )
    a, b = (activation(n, channels, size, dtype, layout) for _ in range(2))
    c = (torch.randn(n, channels) * 0.1 + 1).to(dtype)
    yield from both_directions(f"pixel_norm {label}", ops.pixel_norm, a)
    yield from both_directions(f"pixel_norm + mp_silu {label}", partial(ops.pixel_norm, silu=True), a)
    yield from both_directions(f"mp_silu {label}", ops.mp_silu, a)
    yield from both_directions(f"mp_silu_modulated {label}", ops.mp_silu_modulated, a, c)
    dropout = partial(ops.mp_silu_modulated, dropout=0.1, philox=torch.tensor([1, 2]))
    yield from both_directions(f"mp_silu_modulated + dropout {label}", dropout, a, c)
    yield from both_directions(f"mp_sum {label}", partial(ops.mp_sum, t=0.3), a, b)
    yield from both_directions(f"mp_sum, clipped {label}", partial(ops.mp_sum, t=0.3, clip=256.0), a, b)
    yield from both_directions(f"mp_cat {label}", ops.mp_cat, a, b)
    yield from both_directions(f"mp_cat + mp_silu {label}", partial(ops.mp_cat, silu=True), a, b)
    yield from both_directions(f"resample_down {label}", ops.resample_down, a)
    yield from both_directions(f"resample_down + pixel_norm + mp_silu {label}", ops.resample_down_pixel_norm, a)
    yield from both_directions(f"resample_up {label}", ops.resample_up, a)
    qkv = activation(n, 3 * channels, size, dtype, layout)
    yield from both_directions(
        f"cosine_attention {label}", partial(ops.cosine_attention, num_heads=channels // 32), qkv
    )
    w = torch.randn(channels, channels, 3, 3)
    yield from both_directions(f"mp_conv2d 3×3 {label}", ops.mp_conv2d, a, w, torch.tensor(0.9))


def vector_cases() -> Iterator[Case]:
    x = torch.randn(32)
    freqs, phases = torch.randn(128), torch.rand(128)
    yield from both_directions("mp_fourier 32 → 32×128", ops.mp_fourier, x, freqs, phases)
    yield from both_directions("mp_linear 32×128 → 32×128", ops.mp_linear, torch.randn(32, 128), torch.randn(128, 128))
    yield from both_directions("mp_sum 32×128", ops.mp_sum, torch.randn(32, 128), torch.randn(32, 128))
    yield from both_directions("mp_silu 32×128", ops.mp_silu, torch.randn(32, 128))


def image_cases(n: int, size: int, dtype: torch.dtype, layout: torch.memory_format) -> Iterator[Case]:
    """Latents on the way into the network and out of it; `dtype` and `layout` are the network's."""
    shape = (n, 4, size, size)
    label = f"{n}×4×{size}×{size} {str(dtype).split('.')[1]} {'NHWC' if layout == torch.channels_last else 'NCHW'}"
    x, y, guide, noise = (torch.randn(shape) for _ in range(4))
    f = activation(*shape[:3], dtype, layout)
    sigma, u = torch.rand(n) + 0.1, torch.randn(n)
    t_hat, t_next = torch.tensor(1.7), torch.tensor(1.1)
    network = ops.NetworkInput(0.5, dtype, layout)
    yield Case(f"precondition_input {label}", forward(ops.precondition_input, x, sigma, *network))
    yield from both_directions(f"precondition_output {label}", lambda f: ops.precondition_output(x, f, sigma), f)
    yield Case(f"denoising_loss {label}", forward(ops.denoising_loss, f, x, y, sigma, u))
    euler = partial(ops.sampler_step, t_hat=t_hat, t_next=t_next, network=network)
    yield Case(f"sampler_step, Euler {label}", forward(euler, x, y))
    heun = partial(euler, guide=guide, guidance=2.0, start=noise, noise=noise, churn=0.1)
    yield Case(f"sampler_step, Heun, guidance and noise {label}", forward(heun, x, y))


def optimizer_step(weights: list[Tensor]) -> Work:
    """Everything from gradients of effective weights to the effective weights of the next forward."""
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    for param in params:
        param.grad = torch.randn_like(param)
    ema = PowerEMA(params)
    prepared = {param: torch.empty_like(param, dtype=torch.bfloat16, requires_grad=False) for param in params}
    optimizer = FusedAdam(params, 0.01, gradients="effective", ema=ema, force_normalize=True, prepared=prepared)
    return lambda: optimizer.step([0.01, 0.02])


def weight_cases(weights: list[Tensor]) -> Iterator[Case]:
    """`weights`: the weight tensors of a whole network."""
    millions = sum(w.numel() for w in weights) / 1e6
    label = f"{len(weights)} tensors, {millions:.1f} M"
    largest = max(weights, key=Tensor.numel)
    gains = [torch.tensor(0.9) for _ in weights]
    yield from both_directions(f"normalize_weight {tuple(largest.shape)}", ops.normalize_weight, largest)
    yield from both_directions(
        f"effective_weight {tuple(largest.shape)}", ops.effective_weight, largest, torch.tensor(0.9)
    )
    yield Case(f"effective_weight {label}, forward", forward(ops.effective_weight, weights, gains))
    yield Case(f"force_normalize_ {label}", forward(ops.force_normalize_, [w.clone() for w in weights]))
    prepared = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    prepare = partial(ops.prepare_weights, force=True, out=prepared)
    yield Case(f"prepare_weights, forced, bfloat16 {label}", forward(prepare, [w.clone() for w in weights], gains))
    emas = [[w.clone() for w in weights] for _ in range(2)]
    yield Case(f"ema_update_ 2 profiles, {label}", forward(ops.ema_update_, emas, weights, [0.01, 0.02]))
    yield Case(f"optimizer step, 2 profiles, {label}", optimizer_step(weights))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        inputs = [torch.randn(1 << 20).to(dtype) for _ in range(8)]
        coefs = torch.randn(8, 6, dtype=torch.float64).numpy()
        label = f"8 → 6, 1 M {str(dtype).split('.')[1]}"
        yield Case(f"accumulate_snapshots {label}", forward(ops.accumulate_snapshots, inputs, coefs))
        compensated = partial(ops.accumulate_snapshots, compensated=True)
        yield Case(f"accumulate_snapshots, compensated {label}", forward(compensated, inputs, coefs))
        out = torch.empty(6, 1 << 20, dtype=torch.float32 if dtype == torch.float32 else torch.float16)
        yield Case(f"sum_snapshots {label}", forward(sum_snapshots, inputs, torch.from_numpy(coefs), out))


def all_cases(weights: list[Tensor]) -> Iterator[Case]:
    edm2ext.set_backend("auto")
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.bfloat16):
            yield from activation_cases(32, 64, 16, dtype, layout)
            yield from activation_cases(2, 32, 8, dtype, layout)
            yield from image_cases(32, 64, dtype, layout)
            yield from image_cases(4, 8, dtype, layout)
    yield from vector_cases()
    yield from weight_cases(weights)
