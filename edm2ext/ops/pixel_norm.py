"""Pixel norm (specification 2.10, Eq. 30), optionally with MP-SiLU of the result."""

from typing import Any

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output

_pixel_norm = backend.op("pixel_norm")
_pixel_norm_backward = backend.op("pixel_norm_backward")
_pixel_norm_silu = backend.op("pixel_norm_silu")
_pixel_norm_silu_backward = backend.op("pixel_norm_silu_backward")
_KERNELS = backend.kernels("pixel_norm", "pixel_norm_backward", "pixel_norm_silu", "pixel_norm_silu_backward")


def pixel_norm(x: Tensor, eps: float = reference.EPS, *, silu: bool = False) -> "Tensor | tuple[Tensor, Tensor]":
    """Normalise each pixel of x [N, C, *] over its channels: y = x / (eps + rms) (2.10, Eq. 30).

    Returns y, or with `silu` the pair (y, mp_silu(y)) from one pass. Raises ValueError or TypeError if x has fewer than
    two dimensions or is not floating-point, or eps is not positive.
    """
    checks.activation("pixel_norm", "x", x)
    checks.epsilon("pixel_norm", eps)
    if not backend.native(x, _KERNELS):
        return reference.pixel_norm(x, eps, silu=silu)
    if x.requires_grad and torch.is_grad_enabled():
        return _PixelNormSiLU.apply(x, eps) if silu else _PixelNorm.apply(x, eps)
    return _pixel_norm_silu(x, eps) if silu else _pixel_norm(x, eps)


class _PixelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.eps = eps
        return _pixel_norm(x, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if backend.differentiating_backward():
            return *backend.reference_vjp(lambda x: reference.pixel_norm(x, ctx.eps), (x,), (True,), (grad,)), None
        return _pixel_norm_backward(grad, x, ctx.eps), None


class _PixelNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.eps = eps
        return _pixel_norm_silu(x, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_silu: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if backend.differentiating_backward():
            function = lambda x: reference.pixel_norm(x, ctx.eps, silu=True)  # noqa: E731
            return *backend.reference_vjp(function, (x,), (True,), (grad, grad_silu)), None
        return _pixel_norm_silu_backward(grad, grad_silu, x, ctx.eps), None


@backend.fake("pixel_norm")
def _(x: Tensor, eps: float) -> Tensor:
    torch._check(x.dim() >= 2)
    return empty_output(x)


@backend.fake("pixel_norm_backward")
def _(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    torch._check(grad.shape == x.shape)
    return empty_output(x)


@backend.fake("pixel_norm_silu")
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    torch._check(x.dim() >= 2)
    return empty_output(x), empty_output(x)


@backend.fake("pixel_norm_silu_backward")
def _(grad: Tensor, grad_silu: Tensor, x: Tensor, eps: float) -> Tensor:
    torch._check(grad.shape == x.shape and grad_silu.shape == x.shape)
    return empty_output(x)
