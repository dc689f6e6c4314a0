"""A 1x1 convolution of an MP-Cat (specification 2.4 and 2.6, Eqs. 103 and 47) whose halves nobody joins."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output
from edm2ext.ops import conv_choice
from edm2ext.ops.conv_choice import Problem
from edm2ext.ops.mp_cat import mp_cat
from edm2ext.ops.mp_conv2d import (
    conv2d_of_prepared,
    convolve,
    convolve_forward,
    gradient_of_input,
    gradient_of_weight,
    image_like,
    mp_conv2d,
    on_tensor_cores,
)
from edm2ext.ops.normalize_weight import unchecked_effective_weight
from edm2ext.ops.prepared_weight import Gradients, raw_gradients
from edm2ext.reference import memory_format, product_dtype

_mp_cat = backend.op("mp_cat")
_mp_cat_silu = backend.op("mp_cat_silu")
_mp_cat_silu_only = backend.op("mp_cat_silu_only")
_mp_cat_silu_only_backward = backend.op("mp_cat_silu_only_backward")
_mp_cat_conv2d = backend.op("mp_cat_conv2d")
_mp_cat_conv2d_backward_weight = backend.op("mp_cat_conv2d_backward_weight")
_HALF = 32  # channels of which the kernels want a multiple in each half: kConvHalf
_LEAST_BALANCE = 0.001  # of t and 1 - t: kConvLeastBalance


class CatWith(NamedTuple):
    """What an input x may go through before it is convolved: mp_cat(x, b, t) (2.4)."""

    b: Tensor
    t: float = 0.5

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The concatenation, and mp_silu of it."""
        return mp_cat(x, self.b, self.t, silu=True)


def mp_cat_conv2d(
    a: Tensor,
    b: Tensor,
    w: Tensor,
    gain: "Tensor | float" = 1,
    t: float = 0.5,
    *,
    prepared: bool = False,
    stride: "int | tuple[int, int]" = 1,
    padding: "str | int | tuple[int, int]" = "same",
    dilation: "int | tuple[int, int]" = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """mp_conv2d(x, w, gain) and mp_silu(x) of x = mp_cat(a, b, t) (2.6, 2.2 and 2.4; Eqs. 47, 81 and 103).

    a [N, Ca, H, W], b [N, Cb, H, W]; w and the other arguments are those of `mp_conv2d`. Where that runs on kernels of
    our own, w is [out, Ca + Cb, 1, 1], Ca and Cb are multiples of 32 and out is one of 8, these read a and b in x's
    place, forward and for the gradient of w, unless `edm2ext.tune` found that slower: x is not stored, nor rounded for
    the convolution. Raises what `mp_cat` and `mp_conv2d` raise.
    """
    if _reads_halves(a, b, w, t, stride, padding, dilation, groups):
        checks.gain_of_layer("mp_conv2d", gain, prepared)
        if prepared:
            return _convolve(a, b, w, w.to(a.dtype), 1.0, "effective", t)
        with torch.no_grad():
            kernel = unchecked_effective_weight(w, gain, a.dtype)
        return _convolve(a, b, w, kernel, gain, "raw", t)
    x, x_silu = mp_cat(a, b, t, silu=True)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return mp_conv2d(x, w, gain, prepared=prepared, **options), x_silu


def cat_conv2d_of_prepared(
    a: Tensor,
    b: Tensor,
    w: Tensor,
    effective: Tensor,
    gain: "Tensor | float",
    gradients: Gradients,
    t: float,
    *,
    stride: "int | tuple[int, int]" = 1,
    dilation: "int | tuple[int, int]" = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """mp_cat_conv2d with the effective weight made in advance: see `conv2d_of_prepared`."""
    if _reads_halves(a, b, effective, t, stride, "same", dilation, groups):
        return _convolve(a, b, w, effective.to(a.dtype), gain, gradients, t)
    x, x_silu = mp_cat(a, b, t, silu=True)
    options = {"stride": stride, "dilation": dilation, "groups": groups}
    return conv2d_of_prepared(x, w, effective, gain, gradients, **options), x_silu


def _reads_halves(
    a: Tensor,
    b: Tensor,
    w: Tensor,
    t: float,
    stride: "int | tuple[int, int]",
    padding: "str | int | tuple[int, int]",
    dilation: "int | tuple[int, int]",
    groups: int,
) -> bool:
    """Whether our kernels compute this convolution from its halves; then all these arguments are right."""
    images = a.dim() == b.dim() == w.dim() == 4 and a.shape[0] == b.shape[0] and a.shape[2:] == b.shape[2:]
    return (
        images
        and w.shape[1:] == (a.shape[1] + b.shape[1], 1, 1)
        and min(a.shape[1], b.shape[1]) > 0
        and a.shape[1] % _HALF == b.shape[1] % _HALF == w.shape[0] % 8 == 0
        and _LEAST_BALANCE <= t <= 1 - _LEAST_BALANCE
        and a.dtype == b.dtype == product_dtype(a)
        and a.device == b.device == w.device
        and w.is_floating_point()
        and padding in ("same", 0, (0, 0))
        and on_tensor_cores(a, w, a.dtype, stride, 0, dilation, groups)
        and memory_format(b) == torch.channels_last
        and not (a is b and torch.compiler.is_compiling())  # Dynamo refuses a tensor twice
    )


def _problem(direction: int, a: Tensor, b: Tensor, kernel: Tensor, keep: bool = False) -> Problem:
    batch, cat, height, width = a.shape
    sizes = (batch, height, width, cat + b.shape[1], kernel.shape[0], 1, 1)
    return Problem(direction, *sizes, a.dtype, "", keep, cat)


def _convolve(
    a: Tensor, b: Tensor, w: Tensor, kernel: Tensor, gain: "Tensor | float", gradients: Gradients, t: float
) -> tuple[Tensor, Tensor]:
    """What `mp_conv2d.convolve` does, and mp_silu of the concatenation."""
    kernel = kernel.detach().contiguous(memory_format=torch.channels_last)
    keep = backend.needs_gradient(w) or (isinstance(gain, Tensor) and backend.needs_gradient(gain))
    if not keep and not backend.needs_gradient(a, b):
        return forward_of_halves(a, b, kernel, t, keep=False)[:2]
    if conv_choice.choice(_problem(0, a, b, kernel, keep)) is None:
        x, x_silu = mp_cat(a, b, t, silu=True)
        return convolve(x, w, kernel, gain, gradients), x_silu
    return _CatConvolution.apply(a, b, w, gain, kernel, gradients, t, keep)


def forward_of_halves(
    a: Tensor, b: Tensor, kernel: Tensor, t: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The convolution, mp_silu of the concatenation, and the concatenation where it was chosen to store it. keep:
    whether the gradient of the weight will be asked for."""
    plan = conv_choice.choice(_problem(0, a, b, kernel, keep))
    if plan is None:
        x, x_silu = _mp_cat_silu(a, b, t)
        return convolve_forward(x, kernel, None, "", 0.0, math.inf, keep=False)[0], x_silu, x
    return _mp_cat_conv2d(a, b, kernel, t, plan), _mp_cat_silu_only(a, b, t), None


def gradient_of_weight_of_halves(grad: Tensor, a: Tensor, b: Tensor, kernel: Tensor, t: float) -> Tensor:
    """From the gradient of the convolution, in float32; of the kernel only the shape matters."""
    plan = conv_choice.choice(_problem(2, a, b, kernel))
    if plan is None:
        return gradient_of_weight(grad, _mp_cat(a, b, t), kernel)
    return _mp_cat_conv2d_backward_weight(grad, a, b, t, plan)


class _CatConvolution(torch.autograd.Function):
    """Both results from one node, so that the gradients that reach the concatenation are added while it is split."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        w: Tensor,
        gain: "Tensor | float",
        kernel: Tensor,
        gradients: Gradients,
        t: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        y, x_silu, _ = forward_of_halves(a, b, kernel, t, keep)
        ctx.save_for_backward(a, b, w, kernel, gain if isinstance(gain, Tensor) else None)
        ctx.gain = None if isinstance(gain, Tensor) else float(gain)
        ctx.gradients, ctx.t = gradients, t
        return y, x_silu

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_silu: Tensor) -> tuple[Tensor | None, ...]:
        a, b, w, kernel, gain = ctx.saved_tensors
        nothing = (None,) * 4
        if backend.differentiating_backward():
            return *_differentiable_backward(ctx, (grad, grad_silu)), *nothing
        needs_a, needs_b, needs_w, needs_gain = ctx.needs_input_grad[:4]
        grad_a = grad_b = grad_w = grad_gain = None
        if needs_a or needs_b:
            grad_x = gradient_of_input(grad, kernel)
            grad_a, grad_b = _mp_cat_silu_only_backward(grad_x, grad_silu, a, b, ctx.t)
        if needs_w or needs_gain:
            grad_w = gradient_of_weight_of_halves(grad, a, b, kernel, ctx.t)
            if ctx.gradients == "effective":
                grad_w = grad_w.to(w.dtype, memory_format=memory_format(w))
            else:
                grad_w, grad_gain = raw_gradients(grad_w, w, ctx.gain if gain is None else gain)
        return grad_a, grad_b, grad_w, grad_gain, *nothing


def _differentiable_backward(ctx: Any, grads: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a, b, w and the gain as functions of these and of grads, in plain torch."""
    a, b, w, kernel, gain = ctx.saved_tensors
    raw = ctx.gradients == "raw"

    def function(a: Tensor, b: Tensor, w: Tensor, *gains: Tensor) -> tuple[Tensor, Tensor]:
        if raw:
            weight = reference.effective_weight(w, *(gains or (ctx.gain,)), kernel.dtype)
        else:
            weight = kernel + (w - w.detach()).to(kernel.dtype)
        return reference.mp_cat_conv2d(a, b, weight, t=ctx.t, prepared=True)

    inputs = (a, b, w, gain) if raw and gain is not None else (a, b, w)
    found = backend.reference_vjp(function, inputs, ctx.needs_input_grad[: len(inputs)], grads)
    return *found, *(None,) * (4 - len(found))


@backend.fake("mp_cat_silu_only")
def fake_silu_only(a: Tensor, b: Tensor, t: float) -> Tensor:
    torch._check(a.dim() == b.dim() and a.shape[0] == b.shape[0] and a.shape[2:] == b.shape[2:])
    return empty_output(a, (a.shape[0], a.shape[1] + b.shape[1], *a.shape[2:]))


@backend.fake("mp_cat_silu_only_backward")
def fake_silu_only_backward(grad: Tensor, grad_silu: Tensor, a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    torch._check(grad.shape == grad_silu.shape and grad.shape[1] == a.shape[1] + b.shape[1])
    return empty_output(a), empty_output(a, b.shape)


@backend.fake("mp_cat_conv2d")
def fake_cat_forward(a: Tensor, b: Tensor, w: Tensor, t: float, plan: list[int]) -> Tensor:
    torch._check(a.dim() == 4 and b.dim() == 4 and w.dim() == 4 and w.shape[1] == a.shape[1] + b.shape[1])
    return image_like(a, w.shape[0])


@backend.fake("mp_cat_conv2d_backward_weight")
def fake_cat_backward_weight(grad: Tensor, a: Tensor, b: Tensor, t: float, plan: list[int]) -> Tensor:
    torch._check(grad.dim() == 4 and a.dim() == 4 and b.dim() == 4 and grad.shape[2:] == a.shape[2:])
    shape = (grad.shape[1], a.shape[1] + b.shape[1], 1, 1)
    return torch.empty(shape, dtype=torch.float32, device=a.device, memory_format=torch.channels_last)
