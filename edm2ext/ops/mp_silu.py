"""MP-SiLU (specification 2.2, Eq. 81) and its modulated form (2.8)."""

from typing import Any

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output

_mp_silu = backend.op("mp_silu")
_mp_silu_backward = backend.op("mp_silu_backward")
_mp_silu_modulated = backend.op("mp_silu_modulated")
_mp_silu_modulated_backward = backend.op("mp_silu_modulated_backward")
_KERNELS = backend.kernels("mp_silu", "mp_silu_backward")
_MODULATED_KERNELS = backend.kernels("mp_silu_modulated", "mp_silu_modulated_backward")


def mp_silu(x: Tensor) -> Tensor:
    """SiLU divided by its expected magnitude, x * sigmoid(x) / 0.596 (2.2, Eq. 81), for x of any shape.

    Raises TypeError if x is not a floating-point tensor.
    """
    checks.floating("mp_silu", "x", x)
    if not backend.native(x, _KERNELS):
        return reference.mp_silu(x)
    if x.requires_grad and torch.is_grad_enabled():
        return _MPSiLU.apply(x)
    return _mp_silu(x)


def mp_silu_modulated(x: Tensor, c: Tensor) -> Tensor:
    """mp_silu(x * c), with c [N, C] broadcast over the pixels of x [N, C, *] (2.8); c is cast to x's dtype.

    Raises ValueError or TypeError if the shapes do not match or a tensor is not floating-point.
    """
    checks.modulation(x, c)
    if not backend.native(x, _MODULATED_KERNELS):
        return reference.mp_silu_modulated(x, c)
    c = c.to(x.dtype)
    if (x.requires_grad or c.requires_grad) and torch.is_grad_enabled():
        return _MPSiLUModulated.apply(x, c)
    return _mp_silu_modulated(x, c)


class _MPSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _mp_silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if backend.differentiating_backward():
            return backend.reference_vjp(reference.mp_silu, (x,), ctx.needs_input_grad, (grad,))
        return _mp_silu_backward(grad, x)


class _MPSiLUModulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(x, c)
        return _mp_silu_modulated(x, c)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if backend.differentiating_backward():
            return backend.reference_vjp(reference.mp_silu_modulated, ctx.saved_tensors, ctx.needs_input_grad, (grad,))
        return _mp_silu_modulated_backward(grad, *ctx.saved_tensors)


@backend.fake("mp_silu")
def _(x: Tensor) -> Tensor:
    return empty_output(x)


@backend.fake("mp_silu_backward")
def _(grad: Tensor, x: Tensor) -> Tensor:
    torch._check(grad.shape == x.shape)
    return empty_output(x)


@backend.fake("mp_silu_modulated")
def _(x: Tensor, c: Tensor) -> Tensor:
    torch._check(c.dim() == 2 and c.shape[0] == x.shape[0] and c.shape[1] == x.shape[1])
    return empty_output(x)


@backend.fake("mp_silu_modulated_backward")
def _(grad: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(grad.shape == x.shape)
    return empty_output(x), c.new_empty(c.shape)
