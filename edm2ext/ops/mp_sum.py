"""MP-Sum (specification 2.3, Eq. 88), optionally with activation clipping (2.13)."""

import math
from typing import Any

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output

_mp_sum = backend.op("mp_sum")
_mp_sum_backward = backend.op("mp_sum_backward")
_KERNELS = backend.kernels("mp_sum", "mp_sum_backward")


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5, clip: float | None = None) -> Tensor:
    """Magnitude-preserving blend (a + t * (b - a)) / sqrt((1 - t)^2 + t^2) of equal-shaped a and b (2.3, Eq. 88).

    With `clip` the result is clamped to [-clip, clip] (2.13). Raises ValueError or TypeError if shapes or dtypes differ
    (under autocast the wider dtype is taken), t is outside [0, 1] or clip is not positive.
    """
    a, b = checks.promoted("mp_sum", a, b)
    checks.sum_arguments(a, b, t, clip)
    if not backend.native(a, _KERNELS) or (a is b and torch.compiler.is_compiling()):  # Dynamo refuses a tensor twice
        return reference.mp_sum(a, b, t, clip)
    limit = math.inf if clip is None else clip
    if (a.requires_grad or b.requires_grad) and torch.is_grad_enabled():
        return _MPSum.apply(a, b, t, limit)
    return _mp_sum(a, b, t, limit)


class _MPSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, t: float, clip: float) -> Tensor:
        if clip < math.inf:
            ctx.save_for_backward(a, b)
        ctx.t = t
        ctx.clip = clip
        return _mp_sum(a, b, t, clip)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        t, clip, (needs_a, needs_b, _, _) = ctx.t, ctx.clip, ctx.needs_input_grad
        if clip < math.inf:
            a, b = ctx.saved_tensors
            if backend.differentiating_backward():
                function = lambda a, b: reference.mp_sum(a, b, t, clip)  # noqa: E731
                return *backend.reference_vjp(function, (a, b), (needs_a, needs_b), (grad,)), None, None
            return *_mp_sum_backward(grad, a, b, t, clip), None, None
        if needs_a and needs_b and not backend.differentiating_backward():
            return *_mp_sum_backward(grad, grad, grad, t, clip), None, None
        norm = math.hypot(1 - t, t)
        grad_a = grad * ((1 - t) / norm) if needs_a else None
        grad_b = grad * (t / norm) if needs_b else None
        return grad_a, grad_b, None, None


@backend.fake("mp_sum")
def _(a: Tensor, b: Tensor, t: float, clip: float) -> Tensor:
    torch._check(a.shape == b.shape)
    return empty_output(a)


@backend.fake("mp_sum_backward")
def _(grad: Tensor, a: Tensor, b: Tensor, t: float, clip: float) -> tuple[Tensor, Tensor]:
    torch._check(grad.shape == a.shape and grad.shape == b.shape)
    return empty_output(a), empty_output(b)
