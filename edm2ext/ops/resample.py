"""2x up- and downsampling with a separable filter (specification 2.11)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output

_resample_down = backend.op("resample_down")
_resample_down_backward = backend.op("resample_down_backward")
_resample_up = backend.op("resample_up")
_resample_up_backward = backend.op("resample_up_backward")
_DOWN_KERNELS = backend.kernels("resample_down", "resample_down_backward")
_UP_KERNELS = backend.kernels("resample_up", "resample_up_backward")
_MOST_TAPS_ON_GPU = 128  # of the CUDA kernels


def resample_down(x: Tensor, filter: Sequence[float] = (1, 1)) -> Tensor:
    """Halve height and width of x [N, C, H, W] (2.11); odd sizes lose their last row or column.

    `filter` holds an even number of taps, normalised here to sum 1; (1, 1) averages 2 x 2 pixels. Raises ValueError or
    TypeError for another filter, a shape that is not 4-dimensional or an image smaller than the filter.
    """
    taps = checks.resample_filter("resample_down", filter)
    checks.image("resample_down", "x", x)
    checks.down_size("resample_down", x, len(taps))
    if not _native(x, taps, _DOWN_KERNELS):
        return reference.resample_down(x, taps)
    if x.requires_grad and torch.is_grad_enabled():
        return _ResampleDown.apply(x, taps)
    return _resample_down(x, taps)


def resample_up(x: Tensor, filter: Sequence[float] = (1, 1)) -> Tensor:
    """Double height and width of x [N, C, H, W] (2.11).

    `filter` holds an even number of taps, normalised here to sum 1; (1, 1) repeats each pixel. Raises ValueError or
    TypeError for another filter or a shape that is not 4-dimensional.
    """
    taps = checks.resample_filter("resample_up", filter)
    checks.image("resample_up", "x", x)
    if not _native(x, taps, _UP_KERNELS):
        return reference.resample_up(x, taps)
    if x.requires_grad and torch.is_grad_enabled():
        return _ResampleUp.apply(x, taps)
    return _resample_up(x, taps)


def _native(x: Tensor, taps: list[float], kernels: backend.Kernels) -> bool:
    return backend.native(x, kernels) and (x.is_cpu or len(taps) <= _MOST_TAPS_ON_GPU)


class _ResampleDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: list[float]) -> Tensor:
        ctx.taps = taps
        ctx.shape = x.shape
        return _resample_down(x, taps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if backend.differentiating_backward():
            return *_linear_vjp(reference.resample_down, ctx, grad), None
        return _resample_down_backward(grad, ctx.taps, *ctx.shape[2:]), None


class _ResampleUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: list[float]) -> Tensor:
        ctx.taps = taps
        ctx.shape = x.shape
        return _resample_up(x, taps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if backend.differentiating_backward():
            return *_linear_vjp(reference.resample_up, ctx, grad), None
        return _resample_up_backward(grad, ctx.taps), None


def _linear_vjp(function: Callable[..., Tensor], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The product with the transposed Jacobian, which does not depend on the input."""
    anywhere = grad.new_zeros(ctx.shape, requires_grad=True)
    return backend.reference_vjp(lambda x: function(x, ctx.taps), (anywhere,), (True,), (grad,))


@backend.fake("resample_down")
def _(x: Tensor, filter: list[float]) -> Tensor:
    torch._check(x.dim() == 4)
    return empty_output(x, (*x.shape[:2], *(_halved(size, len(filter)) for size in x.shape[2:])))


@backend.fake("resample_down_backward")
def _(grad: Tensor, filter: list[float], height: int, width: int) -> Tensor:
    torch._check(grad.dim() == 4)
    torch._check(grad.shape[2] == _halved(height, len(filter)) and grad.shape[3] == _halved(width, len(filter)))
    return empty_output(grad, (*grad.shape[:2], height, width))


@backend.fake("resample_up")
def _(x: Tensor, filter: list[float]) -> Tensor:
    torch._check(x.dim() == 4)
    return empty_output(x, (*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))


@backend.fake("resample_up_backward")
def _(grad: Tensor, filter: list[float]) -> Tensor:
    torch._check(grad.dim() == 4 and grad.shape[2] % 2 == 0 and grad.shape[3] % 2 == 0)
    return empty_output(grad, (*grad.shape[:2], grad.shape[2] // 2, grad.shape[3] // 2))


def _halved(size: int, taps: int) -> int:
    return (size + 2 * ((taps - 1) // 2) - taps) // 2 + 1
