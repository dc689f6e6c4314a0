"""Effective weights made in advance, as functions of the raw weights for autograd (specification 2.6, Eq. 47)."""

from typing import Any, Literal

import torch
from torch import Tensor

from edm2ext import backend, checks, reference

_effective_weight_backward = backend.op("effective_weight_backward")
_KERNELS = backend.kernels("effective_weight_backward")
Gradients = Literal["raw", "effective"]


def prepared_weight(
    w: Tensor, effective: Tensor, gain: "Tensor | float" = 1, *, gradients: Gradients = "raw"
) -> Tensor:
    """`effective`, differentiable in the raw weight w [out, in, ...] and the gain it was made from.

    With gradients="raw", w and gain (a number or a 0-dim tensor) get their ordinary gradients (2.6). With "effective",
    w gets the gradient of the effective weight, in w's dtype, and gain none: 2.6 is linear in that gradient, so
    whoever steps the optimizer can apply it once, after accumulation and reduction. Raises ValueError if the shapes
    differ or for another value of gradients.
    """
    checks.prepared_weight(w, effective, gain, gradients)
    if not torch.is_grad_enabled() or not (w.requires_grad or (isinstance(gain, Tensor) and gain.requires_grad)):
        return effective
    if not backend.native(w, _KERNELS):
        return reference.prepared_weight(w, effective, gain, gradients=gradients)
    if gradients == "effective":
        return _StraightThrough.apply(w, effective)
    return _Prepared.apply(w, gain, effective)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, effective: Tensor) -> Tensor:
        ctx.like = w.dtype, reference.memory_format(w)
        return effective.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtype, memory_format = ctx.like
        return grad.to(dtype, memory_format=memory_format), None


class _Prepared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, gain: "Tensor | float", effective: Tensor) -> Tensor:
        ctx.save_for_backward(w, *([gain] if isinstance(gain, Tensor) else []))
        ctx.gain = None if isinstance(gain, Tensor) else float(gain)
        return effective.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, *gains = ctx.saved_tensors
        if backend.differentiating_backward():
            function = lambda w, *gain: reference.effective_weight(w, *(gain or (ctx.gain,)), grad.dtype)  # noqa: E731
            found = backend.reference_vjp(function, (w, *gains), ctx.needs_input_grad[: 1 + len(gains)], (grad,))
            return found[0], found[1] if gains else None, None
        return *raw_gradients(grad, w, gains[0] if gains else ctx.gain), None


def raw_gradients(grad: Tensor, w: Tensor, gain: "Tensor | float") -> tuple[Tensor, Tensor | None]:
    """Of w and of the gain, if it is a tensor, from the gradient of their effective weight (2.6)."""
    if not isinstance(gain, Tensor):
        return _effective_weight_backward(grad, w, None, gain, reference.layer_eps())[0], None
    wide = gain.to(w.device, torch.promote_types(gain.dtype, torch.float32))
    grad_w, grad_gain = _effective_weight_backward(grad, w, wide, 1.0, reference.layer_eps())
    return grad_w, grad_gain.to(gain.device, gain.dtype)
