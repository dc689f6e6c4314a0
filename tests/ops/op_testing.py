"""Comparison of a native op with plain torch and with float64, the same for all ops."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from edm2ext import ops, reference, set_backend

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def _permuted(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": _channels_last,
    "strided": _strided,
    "permuted": _permuted,
}


def compare(
    name: str,
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    expanded_grad: bool = False,
    units: float = 1,
    **arguments: object,
) -> None:
    """Check ops.<name> on the native backend against plain torch: outputs, and gradients of all inputs.

    The inputs are taken in `dtype` and `layout`; with `expanded_grad` the gradients come in with strides of 0. Accuracy
    is that of `assert_accurate`. The output must keep the memory format of the first input.
    """
    rounded = [x.to(dtype) for x in inputs]
    laid_out = [LAYOUTS[layout](x) for x in rounded]
    run = partial(_run, grad_dtype=dtype, expanded_grad=expanded_grad, arguments=arguments)
    plain = run(getattr(reference, name), laid_out)
    exact = run(getattr(reference, name), [x.double() for x in rounded])
    with set_backend("native"):
        native = run(getattr(ops, name), laid_out)
    for got, same_dtype, truth in zip(native, plain, exact, strict=True):
        assert got.dtype == same_dtype.dtype
        assert_accurate(got, same_dtype, truth, units)
    if native[0].dim() == inputs[0].dim():
        assert native[0].is_contiguous(memory_format=reference.memory_format(laid_out[0]))


def _run(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grad_dtype: torch.dtype,
    expanded_grad: bool,
    arguments: dict[str, object],
) -> list[Tensor]:
    """Outputs of the function, then gradients of its inputs for the same random gradients of the outputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs, **arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    grads = []
    for out in outputs:
        shape = [1] * out.dim() if expanded_grad else out.shape
        grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(grad_dtype).to(out.dtype)
        grads.append(grad.expand(out.shape))
    return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, inputs, grads))


def assert_accurate(got: Tensor, same_dtype: Tensor, truth: Tensor, units: float = 1) -> None:
    """Error against float64 at most twice that of plain torch in the same dtype, plus rounding units at max |truth|.

    In float64, where the truth is plain torch itself, 16 times as many are added, at 1 or more.
    """
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    plain_error = (same_dtype.double() - truth).abs().max().item()
    largest = truth.abs().max().item()
    eps = torch.finfo(got.dtype).eps
    allowance = 16 * max(largest, 1) if got.dtype == torch.float64 else largest
    limit = 2 * plain_error + units * eps * allowance
    error = (got.double() - truth).abs().max().item()
    assert error <= limit, f"error {error:.3e}, allowed {limit:.3e} (plain torch: {plain_error:.3e})"


# Every differentiable function in every form, as (function of a backend module, shapes of its differentiable inputs).
# Clipping is tested at 1.3, where no value of these inputs comes near enough to make a difference quotient wrong.
DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...] | list[Tensor]], list[tuple[int, ...]]]] = {
    "pixel_norm": (lambda m, x: m.pixel_norm(x), [(2, 3, 2, 2)]),
    "pixel_norm_silu": (lambda m, x: m.pixel_norm(x, silu=True), [(2, 3, 2, 2)]),
    "mp_silu": (lambda m, x: m.mp_silu(x), [(2, 5)]),
    "mp_silu_modulated": (lambda m, x, c: m.mp_silu_modulated(x, c), [(2, 3, 2, 2), (2, 3)]),
    "mp_silu_modulated_dropout": (
        lambda m, x, c: m.mp_silu_modulated(x, c, 0.4, torch.arange(2), 7),
        [(2, 3, 2, 2), (2, 3)],
    ),
    "mp_sum": (lambda m, a, b: m.mp_sum(a, b, 0.3), [(2, 3), (2, 3)]),
    "mp_sum_clip": (lambda m, a, b: m.mp_sum(a, b, 0.3, clip=1.3), [(2, 6), (2, 6)]),
    "mp_sum_twice": (lambda m, a, b: m.mp_sum(a, b, 0.3, twice=True), [(2, 3), (2, 3)]),
    "mp_sum_clip_twice": (lambda m, a, b: m.mp_sum(a, b, 0.3, clip=1.3, twice=True), [(2, 6), (2, 6)]),
    "mp_cat": (lambda m, a, b: m.mp_cat(a, b, 0.3), [(2, 3, 2), (2, 1, 2)]),
    "mp_cat_silu": (lambda m, a, b: m.mp_cat(a, b, 0.3, silu=True), [(2, 3, 2), (2, 1, 2)]),
    "mp_fourier": (lambda m, x, f, p: m.mp_fourier(x, f, p), [(3,), (4,), (4,)]),
    "resample_down": (lambda m, x: m.resample_down(x, (1, 3, 3, 1)), [(1, 1, 5, 4)]),
    "resample_down_pixel_norm": (lambda m, x: m.resample_down_pixel_norm(x), [(1, 2, 5, 4)]),
    "resample_up": (lambda m, x: m.resample_up(x, (1, 3, 3, 1)), [(1, 1, 3, 2)]),
    "precondition_input": (lambda m, x, s: m.precondition_input(x, s.exp()), [(2, 3, 2, 2), (2,)]),
    "precondition_output": (
        lambda m, x, f, s: m.precondition_output(x, f, s.exp(), 0.4),
        [(2, 3, 2, 2), (2, 3, 2, 2), (1,)],
    ),
    "precondition_output_of_f": (
        lambda m, f: m.precondition_output(
            torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2).to(f), f, f.new_tensor([0.3, 2])
        ),
        [(2, 3, 2, 2)],
    ),
    "normalize_weight": (lambda m, w: m.normalize_weight(w), [(3, 2, 2)]),
    "effective_weight": (lambda m, w, g: m.effective_weight(w, g), [(3, 4), ()]),
    "effective_weight_number": (lambda m, w: m.effective_weight(w, 0.7), [(3, 4)]),
    "effective_weight_list": (lambda m, w, v, g: m.effective_weight([w, v], [g, 2]), [(3, 4), (2, 3), ()]),
    "mp_conv2d": (lambda m, x, w, g: m.mp_conv2d(x, w, g), [(1, 1, 3, 3), (2, 1, 3, 3), ()]),
    "mp_conv2d_prepared": (lambda m, x, w: m.mp_conv2d(x, w, prepared=True), [(1, 2, 2, 2), (3, 2, 1, 1)]),
    "mp_cat_conv2d": (
        lambda m, a, b, w, g: m.mp_cat_conv2d(a, b, w, g, 0.3),
        [(1, 2, 2, 2), (1, 1, 2, 2), (2, 3, 1, 1), ()],
    ),
    "mp_linear": (lambda m, x, w, g: m.mp_linear(x, w, g), [(2, 3), (4, 3), ()]),
    "cosine_attention": (lambda m, x: m.cosine_attention(x, 2), [(1, 12, 2)]),
    "cosine_attention_fused": (lambda m, x: m.cosine_attention(x, 1), [(1, 6, 1, 257)]),
}
