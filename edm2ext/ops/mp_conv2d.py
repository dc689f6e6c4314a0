"""Magnitude-preserving convolution and linear layer (specification 2.6, Eq. 47)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edm2ext import _library, backend, checks
from edm2ext.ops.normalize_weight import unchecked_effective_weight
from edm2ext.reference import memory_format, product_dtype

_conv_weight_grad = backend.op("conv_weight_grad")
_KERNELS = backend.kernels("conv_weight_grad")
_LANES = 8  # its input channels come in multiples of this
# Where it was measured faster than the library's (1.4 to 2 times).
_FASTER = _library.build_info()["cpu_isa"] == "avx2"


def mp_conv2d(
    x: Tensor,
    w: Tensor,
    gain: "Tensor | float" = 1,
    *,
    prepared: bool = False,
    stride: "int | tuple[int, int]" = 1,
    padding: "str | int | tuple[int, int]" = "same",
    dilation: "int | tuple[int, int]" = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution of x [N, C, H, W] with the effective weight of w [out, C / groups, kh, kw] (2.6, Eq. 47).

    gain is a number or a 0-dim tensor. The weight follows x's dtype, or autocast's. Padding "same" puts
    dilation * (k - 1) / 2 zeros on each side, so that stride 1 keeps the size, and needs odd kernel sizes. With
    `prepared`, w is an effective weight already, and gain must be 1. Raises ValueError or TypeError for shapes that do
    not match, or other values of gain, padding and groups.
    """
    pad = checks.conv_arguments(x, w, gain, prepared, padding, dilation, groups)
    dtype = product_dtype(x)
    kernel = w.to(dtype) if prepared else unchecked_effective_weight(w, gain, dtype)
    if _FASTER and _summed_natively(x, kernel, (stride, pad, dilation, groups)):
        return _Conv.apply(x, kernel)
    return F.conv2d(x, kernel, stride=stride, padding=pad, dilation=dilation, groups=groups)


def _summed_natively(x: Tensor, kernel: Tensor, options: tuple[object, ...]) -> bool:
    """Whether the native op makes the kernel's gradient: stride 1, "same" padding, channels_last in float32."""
    size = kernel.shape[2]
    return (
        kernel.requires_grad
        and torch.is_grad_enabled()
        and x.dtype == kernel.dtype == torch.float32
        and options in ((1, (size // 2, size // 2), 1, 1), (1, size // 2, 1, 1))
        and kernel.shape[3] == size
        and size % 2 == 1
        and x.shape[1] % _LANES == 0
        and memory_format(x) == torch.channels_last
        and backend.native(x, _KERNELS)
        and not torch.compiler.is_compiling()
    )


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return F.conv2d(x, kernel, padding=kernel.shape[2] // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        size = kernel.shape[2]
        needs_x, needs_kernel = ctx.needs_input_grad
        if backend.differentiating_backward():
            function = lambda x, kernel: F.conv2d(x, kernel, padding=size // 2)  # noqa: E731
            return backend.reference_vjp(function, (x, kernel), (needs_x, needs_kernel), (grad,))
        pad, ones = [size // 2] * 2, [1, 1]
        mask = [needs_x, False, False]
        grad_x = torch.ops.aten.convolution_backward(grad, x, kernel, None, ones, pad, ones, False, [0, 0], 1, mask)[0]
        return grad_x, _conv_weight_grad(grad, x, size) if needs_kernel else None


@backend.fake("conv_weight_grad")
def _(grad: Tensor, x: Tensor, kernel_size: int) -> Tensor:
    return x.new_empty([grad.shape[1], x.shape[1], kernel_size, kernel_size])


def mp_linear(x: Tensor, w: Tensor, gain: "Tensor | float" = 1, *, prepared: bool = False) -> Tensor:
    """x [..., in] times the effective weight of the raw weight w [out, in], without bias (2.6, Eq. 47).

    gain is a number or a 0-dim tensor. The weight follows x's dtype, or autocast's. With `prepared`, w is an effective
    weight already, and gain must be 1. Raises ValueError or TypeError for shapes that do not match or another gain.
    """
    checks.linear_arguments(x, w, gain, prepared)
    dtype = product_dtype(x)
    return F.linear(x, w.to(dtype) if prepared else unchecked_effective_weight(w, gain, dtype))
