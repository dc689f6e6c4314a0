"""Downsampling, pixel norm of the result and MP-SiLU of that (specification 2.11, 2.10, 3.2), in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output
from edm2ext.ops.pixel_norm import pixel_norm
from edm2ext.ops.resample import resample_down

_forward = backend.op("resample_down_pixel_norm")
_backward = backend.op("resample_down_pixel_norm_backward")
_KERNELS = backend.kernels("resample_down_pixel_norm", "resample_down_pixel_norm_backward")


def resample_down_pixel_norm(
    x: Tensor, filter: Sequence[float] = (1, 1), eps: float = reference.EPS
) -> tuple[Tensor, Tensor]:
    """y = pixel_norm(resample_down(x, filter), eps) and mp_silu(y), for x [N, C, H, W] (2.11, 2.10).

    An encoder block that halves the resolution starts so (3.2). With the filter (1, 1) it is one pass that keeps
    nothing but y and a number per pixel for the backward pass; otherwise it is the two steps. Raises ValueError or
    TypeError as they do.
    """
    function = "resample_down_pixel_norm"
    taps = checks.resample_filter(function, filter)
    checks.image(function, "x", x)
    checks.down_size(function, x, len(taps))
    checks.epsilon(function, eps)
    if len(taps) > 2 or taps[0] != taps[1] or not backend.native(x, _KERNELS):
        return pixel_norm(resample_down(x, taps), eps, silu=True)
    if x.requires_grad and torch.is_grad_enabled():
        return _ResampleDownPixelNorm.apply(x, eps)[:2]
    return _forward(x, eps)[:2]


class _ResampleDownPixelNorm(torch.autograd.Function):
    """The results are saved in place of x. Their gradient is a function of themselves, so that it can be differentiated
    again; the rms has a gradient only then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, y_silu, rms = _forward(x, eps)
        ctx.save_for_backward(y, rms)
        ctx.eps = eps
        ctx.size = x.shape[2:]
        ctx.set_materialize_grads(False)
        return y, y_silu, rms

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_silu: Tensor | None, grad_rms: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y, rms = ctx.saved_tensors
        grad = torch.zeros_like(y) if grad is None else grad
        grad_silu = torch.zeros_like(y) if grad_silu is None else grad_silu
        if grad_rms is not None or backend.differentiating_backward():
            return _gradient(grad, grad_silu, grad_rms, y, rms, ctx.eps, ctx.size), None
        return _backward(grad, grad_silu, y, rms, ctx.eps, *ctx.size), None


def _gradient(
    grad: Tensor, grad_silu: Tensor, grad_rms: Tensor | None, y: Tensor, rms: Tensor, eps: float, size: Sequence[int]
) -> Tensor:
    """The gradient of x in plain torch, from y = m / (eps + rms(m)) and rms, m being the means (2.1)."""
    rms = rms.unsqueeze(1)
    sigmoid = y.sigmoid()
    grad_y = grad + grad_silu * sigmoid * (1 + y * (1 - sigmoid)) / reference.SILU_SCALE
    divisor = rms.masked_fill(rms == 0, torch.inf)  # at 0 the norm's sub-gradient is 0
    grad_mean = grad_y / (eps + rms) - y * (grad_y * y).mean(1, keepdim=True) / divisor
    if grad_rms is not None:
        grad_mean = grad_mean + grad_rms.unsqueeze(1) * y * (eps + rms) / (y.shape[1] * divisor)
    spread = reference.resample_up(grad_mean / 4)
    return F.pad(spread, (0, size[1] - spread.shape[3], 0, size[0] - spread.shape[2])).to(y.dtype)


@backend.fake("resample_down_pixel_norm")
def _(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.dim() == 4)
    batch, channels, height, width = x.shape
    shape = (batch, channels, height // 2, width // 2)
    rms = x.new_empty((batch, height // 2, width // 2), dtype=torch.promote_types(x.dtype, torch.float32))
    return empty_output(x, shape), empty_output(x, shape), rms


@backend.fake("resample_down_pixel_norm_backward")
def _(grad: Tensor, grad_silu: Tensor, y: Tensor, rms: Tensor, eps: float, height: int, width: int) -> Tensor:
    torch._check(y.dim() == 4 and grad.shape == y.shape and grad_silu.shape == y.shape)
    return empty_output(y, (*y.shape[:2], height, width))
