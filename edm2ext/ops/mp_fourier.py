"""MP-Fourier features (specification 2.5, Eq. 75)."""

from typing import Any

import torch
from torch import Tensor

from edm2ext import backend, checks, reference

_mp_fourier = backend.op("mp_fourier")
_mp_fourier_backward = backend.op("mp_fourier_backward")
_KERNELS = backend.kernels("mp_fourier", "mp_fourier_backward")


def mp_fourier(x: Tensor, freqs: Tensor, phases: Tensor) -> Tensor:
    """sqrt(2) * cos(x * freqs + phases): x [N], freqs and phases [C] -> [N, C] in x's dtype (2.5, Eq. 75).

    Computed in float32, or in float64 when x is float64. Raises ValueError or TypeError if a tensor has not one
    dimension or is not floating-point, or if freqs and phases differ in length.
    """
    checks.fourier_arguments(x, freqs, phases)
    if not backend.native(x, _KERNELS):
        return reference.mp_fourier(x, freqs, phases)
    dtype = torch.promote_types(x.dtype, torch.float32)
    freqs, phases = freqs.to(dtype), phases.to(dtype)
    if (x.requires_grad or freqs.requires_grad or phases.requires_grad) and torch.is_grad_enabled():
        return _MPFourier.apply(x, freqs, phases)
    return _mp_fourier(x, freqs, phases)


class _MPFourier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, freqs: Tensor, phases: Tensor) -> Tensor:
        ctx.save_for_backward(x, freqs, phases)
        return _mp_fourier(x, freqs, phases)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if backend.differentiating_backward():
            return backend.reference_vjp(reference.mp_fourier, ctx.saved_tensors, ctx.needs_input_grad, (grad,))
        return _mp_fourier_backward(grad, *ctx.saved_tensors)


@backend.fake("mp_fourier")
def _(x: Tensor, freqs: Tensor, phases: Tensor) -> Tensor:
    torch._check(x.dim() == 1 and freqs.dim() == 1 and freqs.shape == phases.shape)
    return x.new_empty(x.shape[0], freqs.shape[0])


@backend.fake("mp_fourier_backward")
def _(grad: Tensor, x: Tensor, freqs: Tensor, phases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(grad.dim() == 2 and grad.shape[0] == x.shape[0] and grad.shape[1] == freqs.shape[0])
    return x.new_empty(x.shape), freqs.new_empty(freqs.shape), phases.new_empty(phases.shape)
