"""MP-Cat (specification 2.4, Eq. 103), optionally with MP-SiLU of the result."""

from typing import Any

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output

_mp_cat = backend.op("mp_cat")
_mp_cat_backward = backend.op("mp_cat_backward")
_mp_cat_silu = backend.op("mp_cat_silu")
_mp_cat_silu_backward = backend.op("mp_cat_silu_backward")
_KERNELS = backend.kernels("mp_cat", "mp_cat_backward", "mp_cat_silu", "mp_cat_silu_backward")


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5, *, silu: bool = False) -> "Tensor | tuple[Tensor, Tensor]":
    """Magnitude-preserving concatenation of a [N, Ca, *] and b [N, Cb, *] along channels (2.4, Eq. 103).

    The inputs are scaled so that each contributes in proportion to 1 - t and t, whatever their channel counts. Returns
    out [N, Ca + Cb, *], or with `silu` the pair (out, mp_silu(out)) from one pass. Raises ValueError or TypeError if
    shapes or dtypes do not match (under autocast the wider dtype is taken) or t is outside [0, 1].
    """
    a, b = checks.promoted("mp_cat", a, b)
    checks.cat_arguments(a, b, t)
    if not backend.native(a, _KERNELS) or (a is b and torch.compiler.is_compiling()):  # Dynamo refuses a tensor twice
        return reference.mp_cat(a, b, t, silu=silu)
    if (a.requires_grad or b.requires_grad) and torch.is_grad_enabled():
        return _MPCatSiLU.apply(a, b, t) if silu else _MPCat.apply(a, b, t)
    return _mp_cat_silu(a, b, t) if silu else _mp_cat(a, b, t)


class _MPCat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, t: float) -> Tensor:
        ctx.channels = a.shape[1], b.shape[1]
        ctx.t = t
        return _mp_cat(a, b, t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_a, needs_b, _ = ctx.needs_input_grad
        if needs_a and needs_b and not backend.differentiating_backward():
            return *_mp_cat_backward(grad, ctx.channels[0], ctx.t), None
        return *_split(grad, ctx.channels, ctx.t, (needs_a, needs_b)), None


class _MPCatSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
        out, out_silu = _mp_cat_silu(a, b, t)
        ctx.save_for_backward(out)
        ctx.channels = a.shape[1], b.shape[1]
        ctx.t = t
        return out, out_silu

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_silu: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        if backend.differentiating_backward():
            (through_silu,) = backend.reference_vjp(reference.mp_silu, (out,), (True,), (grad_silu,))
            return *_split(grad + through_silu, ctx.channels, ctx.t, ctx.needs_input_grad[:2]), None
        return *_mp_cat_silu_backward(grad, grad_silu, out, ctx.channels[0], ctx.t), None


def _split(
    grad: Tensor, channels: tuple[int, int], t: float, needs_grad: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of mp_cat in plain torch, those wanted only."""
    scale_a, scale_b = reference.cat_scales(*channels, t)
    grad_a = grad.narrow(1, 0, channels[0]) * scale_a if needs_grad[0] else None
    grad_b = grad.narrow(1, *channels) * scale_b if needs_grad[1] else None
    return grad_a, grad_b


@backend.fake("mp_cat")
def _(a: Tensor, b: Tensor, t: float) -> Tensor:
    return _empty_cat(a, b)


@backend.fake("mp_cat_backward")
def _(grad: Tensor, channels_a: int, t: float) -> tuple[Tensor, Tensor]:
    return _empty_parts(grad, channels_a)


@backend.fake("mp_cat_silu")
def _(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    return _empty_cat(a, b), _empty_cat(a, b)


@backend.fake("mp_cat_silu_backward")
def _(grad: Tensor, grad_silu: Tensor, out: Tensor, channels_a: int, t: float) -> tuple[Tensor, Tensor]:
    torch._check(grad.shape == out.shape and grad_silu.shape == out.shape)
    return _empty_parts(out, channels_a)


def _empty_cat(a: Tensor, b: Tensor) -> Tensor:
    torch._check(a.dim() == b.dim() and a.shape[0] == b.shape[0] and a.shape[2:] == b.shape[2:])
    return empty_output(a, (a.shape[0], a.shape[1] + b.shape[1], *a.shape[2:]))


def _empty_parts(out: Tensor, channels_a: int) -> tuple[Tensor, Tensor]:
    batch, channels, *spatial = out.shape
    torch._check(channels_a <= channels)
    return empty_output(out, (batch, channels_a, *spatial)), empty_output(out, (batch, channels - channels_a, *spatial))
