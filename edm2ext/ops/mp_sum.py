"""MP-Sum (specification 2.3, Eq. 88), optionally with activation clipping (2.13)."""

import math
from typing import Any

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output

_mp_sum = backend.op("mp_sum")
_mp_sum_clipped = backend.op("mp_sum_clipped")
_mp_sum_backward = backend.op("mp_sum_backward")
_KERNELS = backend.kernels("mp_sum", "mp_sum_clipped", "mp_sum_backward")
MASKED_TOGETHER = 8  # elements to a byte of the mask, the first in its lowest bit


def mp_sum(
    a: Tensor, b: Tensor, t: float = 0.5, clip: float | None = None, *, twice: bool = False
) -> "Tensor | tuple[Tensor, Tensor]":
    """Magnitude-preserving blend (a + t * (b - a)) / sqrt((1 - t)^2 + t^2) of equal-shaped a and b (2.3, Eq. 88).

    With `clip` the result is clamped to [-clip, clip] (2.13). With `twice` it is returned twice, in one memory, for two
    users: the backward pass then adds up their gradients while reading them, not in a pass of its own. Raises
    ValueError or TypeError if shapes or dtypes differ (under autocast the wider dtype is taken), t is outside [0, 1] or
    clip is not positive.
    """
    a, b = checks.promoted("mp_sum", a, b)
    checks.sum_arguments(a, b, t, clip)
    if not backend.native(a, _KERNELS) or (a is b and torch.compiler.is_compiling()):  # Dynamo refuses a tensor twice
        return reference.mp_sum(a, b, t, clip, twice=twice)
    limit = math.inf if clip is None else clip
    if (a.requires_grad or b.requires_grad) and torch.is_grad_enabled():
        return _MPSum.apply(a, b, t, limit, twice)
    y = _mp_sum(a, b, t, limit)
    return (y, y) if twice else y


class _MPSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, t: float, clip: float, twice: bool) -> "Tensor | tuple[Tensor, Tensor]":
        y, mask = _mp_sum_clipped(a, b, t, clip) if clip < math.inf else (_mp_sum(a, b, t, clip), None)
        ctx.save_for_backward(mask)
        ctx.t = t
        ctx.memory_format = reference.memory_format(y)
        return (y, y.view_as(y)) if twice else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor, more_grad: Tensor | None = None) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return *gradients_of_sum(grad, more_grad, mask, ctx.t, ctx.memory_format), None, None, None


def gradients_of_sum(
    grad: Tensor, more_grad: Tensor | None, mask: Tensor | None, t: float, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """Those of a and b from that of the sum, or from those of its two users, with the mask of a clipped sum, which is
    in that memory format. Differentiable where backward itself is being differentiated."""
    if not backend.differentiating_backward():
        return _mp_sum_backward(grad, more_grad, mask, t, memory_format != torch.contiguous_format)
    if more_grad is not None:
        grad = grad + more_grad
    if mask is not None:
        grad = torch.where(_unpacked(mask, grad, memory_format), grad, 0)
    norm = math.hypot(1 - t, t)
    return grad * ((1 - t) / norm), grad * (t / norm)


def _unpacked(mask: Tensor, like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The mask as a bool for every element of a tensor of like's shape and that memory format."""
    bits = mask[:, None] >> torch.arange(MASKED_TOGETHER, device=mask.device) & 1
    strides = torch.empty(like.shape, device="meta", memory_format=memory_format).stride()
    return bits.flatten().bool().as_strided(like.shape, strides)


@backend.fake("mp_sum")
def _(a: Tensor, b: Tensor, t: float, clip: float) -> Tensor:
    torch._check(a.shape == b.shape)
    return empty_output(a)


@backend.fake("mp_sum_clipped")
def _(a: Tensor, b: Tensor, t: float, clip: float) -> tuple[Tensor, Tensor]:
    torch._check(a.shape == b.shape)
    bytes_of_mask = (a.numel() + MASKED_TOGETHER - 1) // MASKED_TOGETHER
    return empty_output(a), a.new_empty([bytes_of_mask], dtype=torch.uint8)


@backend.fake("mp_sum_backward")
def _(
    grad: Tensor, more_grad: Tensor | None, mask: Tensor | None, t: float, channels_last: bool
) -> tuple[Tensor, Tensor]:
    torch._check(more_grad is None or grad.shape == more_grad.shape)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    memory_format = formats.get(grad.dim(), torch.contiguous_format)
    grad_a, grad_b = (
        torch.empty(grad.shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format) for _ in range(2)
    )
    return grad_a, grad_b
