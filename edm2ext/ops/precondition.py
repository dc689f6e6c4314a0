"""Preconditioning of the U-Net (specification 3.4, Eqs. 4 to 8): its input and the denoiser made of its output."""

from typing import Any

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output

_input = backend.op("precondition_input")
_output = backend.op("precondition_output")
_output_backward = backend.op("precondition_output_backward")
_INPUT_KERNELS = backend.kernels("precondition_input")
_OUTPUT_KERNELS = backend.kernels("precondition_output", "precondition_output_backward")


def precondition_input(
    x: Tensor,
    sigma: Tensor,
    sigma_data: float = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """What the U-Net sees of the noisy image x: c_in * x and the constant channel, in one pass (3.4, 2.14; Eq. 7).

    x [N, C, H, W] at noise levels `sigma` (1 or N, in any shape) -> [N, C + 1, H, W] in `dtype`, by default x's, and in
    `memory_format` (contiguous_format or channels_last). c_in = 1 / sqrt(sigma^2 + sigma_data^2) and the product are
    taken in float32, or in float64 for float64; the last channel is 1. Training needs no gradient of x or sigma: where
    one is asked for, the reference serves. Raises ValueError or TypeError if a shape, dtype or format does not fit or
    sigma_data is not positive.
    """
    function = "precondition_input"
    checks.noisy_image(function, x, sigma, sigma_data)
    dtype = x.dtype if dtype is None else dtype
    checks.input_format(function, dtype, memory_format)
    exact = reference.image_dtype(dtype)
    x, sigma = x.to(exact), sigma.to(exact)
    if not _served(x, dtype, _INPUT_KERNELS) or backend.needs_gradient(x, sigma):
        return reference.precondition_input(x, sigma, sigma_data, dtype, memory_format)
    return _input(x, sigma, sigma_data, dtype, memory_format == torch.channels_last)


def precondition_output(x: Tensor, f: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The denoised image D = c_skip * x + c_out * F of the U-Net's output F (3.4; Eqs. 4 to 6).

    x and F [N, C, H, W], in layouts and dtypes of their own, and noise levels `sigma` (1 or N, in any shape) -> D in
    float32, or in float64 for float64 F, in x's memory format. c_skip = sigma_data^2 / (sigma^2 + sigma_data^2), c_out
    = sigma * sigma_data / sqrt(sigma^2 + sigma_data^2). The gradient of F has its dtype and layout; where one of x or
    sigma is asked for, the reference serves. Raises ValueError or TypeError if a shape or dtype does not fit or
    sigma_data is not positive.
    """
    function = "precondition_output"
    checks.noisy_image(function, x, sigma, sigma_data)
    checks.like(function, "f", f, x)
    exact = reference.image_dtype(f.dtype)
    x, sigma = x.to(exact), sigma.to(exact)
    if not _served(x, f.dtype, _OUTPUT_KERNELS) or backend.needs_gradient(x, sigma):
        return reference.precondition_output(x, f, sigma, sigma_data)
    if backend.needs_gradient(f):
        return _PreconditionOutput.apply(x, f, sigma, sigma_data)
    return _output(x, f, sigma, sigma_data)


def _served(x: Tensor, dtype: torch.dtype, kernels: backend.Kernels) -> bool:
    return backend.native(x, kernels) and dtype in backend.dtypes(x)


class _PreconditionOutput(torch.autograd.Function):
    """Linear in F: the backward needs nothing but sigma."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
        ctx.save_for_backward(sigma)
        ctx.sigma_data = sigma_data
        ctx.dtype = f.dtype
        ctx.memory_format = reference.memory_format(f)
        return _output(x, f, sigma, sigma_data)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (sigma,) = ctx.saved_tensors
        if backend.differentiating_backward():
            levels = sigma.reshape(-1, 1, 1, 1)
            c_out = levels * ctx.sigma_data / (levels**2 + ctx.sigma_data**2).sqrt()
            return None, (grad * c_out).to(ctx.dtype, memory_format=ctx.memory_format), None, None
        channels_last = ctx.memory_format == torch.channels_last
        return None, _output_backward(grad, sigma, ctx.sigma_data, ctx.dtype, channels_last), None, None


@backend.fake("precondition_input")
def _(x: Tensor, sigma: Tensor, sigma_data: float, dtype: torch.dtype, channels_last: bool) -> Tensor:
    batch, channels, height, width = x.shape
    return _empty(x, (batch, channels + 1, height, width), dtype, channels_last)


@backend.fake("precondition_output")
def _(x: Tensor, f: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    torch._check(x.shape == f.shape)
    return empty_output(x)


@backend.fake("precondition_output_backward")
def _(grad: Tensor, sigma: Tensor, sigma_data: float, dtype: torch.dtype, channels_last: bool) -> Tensor:
    torch._check(grad.dim() == 4)
    return _empty(grad, grad.shape, dtype, channels_last)


def _empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)
