"""MP-SiLU (specification 2.2, Eq. 81) and its modulated form (2.8), optionally with dropout (2.9)."""

from typing import Any

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output

_mp_silu = backend.op("mp_silu")
_mp_silu_backward = backend.op("mp_silu_backward")
_mp_silu_modulated = backend.op("mp_silu_modulated")
_mp_silu_modulated_backward = backend.op("mp_silu_modulated_backward")
_mp_silu_modulated_dropout = backend.op("mp_silu_modulated_dropout")
_mp_silu_modulated_dropout_backward = backend.op("mp_silu_modulated_dropout_backward")
_KERNELS = backend.kernels("mp_silu", "mp_silu_backward")
_MODULATED_KERNELS = backend.kernels("mp_silu_modulated", "mp_silu_modulated_backward")
_DROPOUT_KERNELS = backend.kernels("mp_silu_modulated_dropout", "mp_silu_modulated_dropout_backward")


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


def mp_silu_modulated(
    x: Tensor, c: Tensor, dropout: float = 0.0, philox: Tensor | None = None, subsequence: int = 0
) -> Tensor:
    """mp_silu(x * c), with c [N, C] broadcast over the pixels of x [N, C, *] (2.8); c is cast to x's dtype.

    With `dropout` > 0 (2.9), that share of the elements, rounded to a multiple of 2^-16, is zero and the others are
    scaled up. Which ones is a function of `philox`, int64 [2] on x's device (seed and offset, drawn once per forward of
    the network), of `subsequence` (the layer's number, below 2^16) and of the element's place alone, the same in every
    memory format, dtype and backend: the mask is not stored, and recomputing the layer repeats it.
    `reference.dropout_mask` is its definition.

    Raises ValueError or TypeError if the shapes do not match, a tensor is not floating-point, dropout is outside [0, 1)
    or philox is missing or of another form.
    """
    checks.modulation(x, c)
    threshold = checks.dropout(dropout, philox, subsequence, x)
    if not backend.native(x, _DROPOUT_KERNELS if threshold else _MODULATED_KERNELS):
        return reference.mp_silu_modulated(x, c, dropout, philox, subsequence)
    c = c.to(x.dtype)
    differentiable = (x.requires_grad or c.requires_grad) and torch.is_grad_enabled()
    if threshold:
        function = _MPSiLUModulatedDropout.apply if differentiable else _mp_silu_modulated_dropout
        return function(x, c, philox, subsequence, threshold)
    return _MPSiLUModulated.apply(x, c) if differentiable else _mp_silu_modulated(x, c)


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


class _MPSiLUModulatedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, philox: Tensor, subsequence: int, threshold: int) -> Tensor:
        ctx.save_for_backward(x, c, philox)
        ctx.subsequence = subsequence
        ctx.threshold = threshold
        return _mp_silu_modulated_dropout(x, c, philox, subsequence, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, c, philox = ctx.saved_tensors
        subsequence, threshold = ctx.subsequence, ctx.threshold
        if backend.differentiating_backward():
            function = lambda x, c: reference.mp_silu_modulated(x, c, threshold / 2**16, philox, subsequence)  # noqa: E731
            grads = backend.reference_vjp(function, (x, c), ctx.needs_input_grad[:2], (grad,))
        else:
            grads = _mp_silu_modulated_dropout_backward(grad, x, c, philox, subsequence, threshold)
        return *grads, None, None, None


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


@backend.fake("mp_silu_modulated_dropout")
def _(x: Tensor, c: Tensor, philox: Tensor, subsequence: int, threshold: int) -> Tensor:
    torch._check(c.dim() == 2 and c.shape[0] == x.shape[0] and c.shape[1] == x.shape[1])
    return empty_output(x)


@backend.fake("mp_silu_modulated_dropout_backward")
def _(grad: Tensor, x: Tensor, c: Tensor, philox: Tensor, subsequence: int, threshold: int) -> tuple[Tensor, Tensor]:
    torch._check(grad.shape == x.shape)
    return empty_output(x), c.new_empty(c.shape)
