"""Convolutions on a CPU with a kernel of our own for the gradient of the weight; the rest of them is torch's."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edm2ext import _library, backend, reference
from edm2ext.ops.prepared_weight import Gradients, raw_gradients
from edm2ext.reference import memory_format

_conv_weight_grad = backend.op("conv_weight_grad")
_KERNELS = backend.kernels("conv_weight_grad", "effective_weight_backward")
_LANES = 8  # its input channels come in multiples of this


def faster_dtypes(info: Mapping[str, object]) -> frozenset[torch.dtype]:
    """Those in which it was measured faster than torch's on a CPU of which `build_info` says this
    (benchmarks/results): 1.3 to 5 times."""
    if info["cpu_isa"] not in ("avx2", "avx512"):
        return frozenset()
    multiplied = info["cpu_isa"] == "avx512" and info["cpu_bf16"] == "avx512_bf16"
    return frozenset({torch.float32, torch.bfloat16} if multiplied else {torch.float32})


_FASTER = faster_dtypes(_library.build_info())


def serves(
    x: Tensor,
    w: Tensor,
    dtype: torch.dtype,
    stride: "int | tuple[int, int]",
    padding: "int | tuple[int, int]",
    dilation: "int | tuple[int, int]",
    groups: int,
) -> bool:
    """Whether the gradient of the weight is wanted, and of a convolution in this dtype that the kernel is faster for:
    stride 1, "same" padding, channels_last."""
    size = w.shape[2]
    return (
        dtype in _FASTER
        and backend.needs_gradient(w)
        and (stride, padding, dilation, groups) in ((1, (size // 2, size // 2), 1, 1), (1, size // 2, 1, 1))
        and w.shape[3] == size
        and size % 2 == 1
        and x.shape[1] % _LANES == 0
        and x.is_cpu
        and memory_format(x) == torch.channels_last
        and backend.native(x, _KERNELS)
        and w.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
    )


def convolve(x: Tensor, w: Tensor, kernel: Tensor, gain: "Tensor | float", gradients: Gradients) -> Tensor:
    """x convolved with the effective weight `kernel`, of x's dtype, made of w and gain. Their gradients are those of
    `ops.prepared_weight`; that of the kernel is summed and handed on in float32."""
    return _Convolution.apply(x, w, gain, kernel, gradients)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, gain: "Tensor | float", kernel: Tensor, gradients: Gradients) -> Tensor:
        ctx.save_for_backward(x, w, kernel, gain if isinstance(gain, Tensor) else None)
        ctx.gain, ctx.gradients = gain, gradients
        if isinstance(gain, Tensor):
            ctx.gain = None
        return F.conv2d(x, kernel, padding=kernel.shape[2] // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, kernel, gain = ctx.saved_tensors
        if backend.differentiating_backward():
            return *_differentiable_backward(ctx, grad), None, None
        needs_x, needs_w, needs_gain = ctx.needs_input_grad[:3]
        size = kernel.shape[2]
        grad_x = grad_w = grad_gain = None
        if needs_x:
            pad, ones = [size // 2] * 2, [1, 1]
            options = (None, ones, pad, ones, False, [0, 0], 1, [True, False, False])
            grad_x = torch.ops.aten.convolution_backward(grad, x, kernel, *options)[0]
        if needs_w or needs_gain:
            grad_w = _conv_weight_grad(grad, x, size)
            if ctx.gradients == "effective":
                grad_w = grad_w.to(w.dtype, memory_format=memory_format(w))
            else:
                grad_w, grad_gain = raw_gradients(grad_w, w, ctx.gain if gain is None else gain)
        return grad_x, grad_w, grad_gain, None, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, w and the gain as functions of these and of grad, in plain torch."""
    x, w, kernel, gain = ctx.saved_tensors
    raw = ctx.gradients == "raw"

    def function(x: Tensor, w: Tensor, *gains: Tensor) -> Tensor:
        if raw:
            weight = reference.effective_weight(w, *(gains or (ctx.gain,)), kernel.dtype)
        else:
            weight = kernel.detach() + (w - w.detach()).to(kernel.dtype)
        return F.conv2d(x, weight, padding=kernel.shape[2] // 2)

    inputs = (x, w, gain) if raw and gain is not None else (x, w)
    found = backend.reference_vjp(function, inputs, ctx.needs_input_grad[: len(inputs)], (grad,))
    return found[0], found[1], found[2] if len(found) > 2 else None


@backend.fake("conv_weight_grad")
def _(grad: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    return x.new_empty([grad.shape[1], x.shape[1], kernel_size, kernel_size], dtype=torch.float32)
