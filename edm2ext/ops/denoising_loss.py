"""The training loss of the U-Net's output and its gradients (specification 4.1, Eqs. 14 to 16 and 21), in one pass."""

import torch
from torch import Tensor

from edm2ext import backend, checks, reference
from edm2ext.backend import empty_output

_loss = backend.op("denoising_loss")
_KERNELS = backend.kernels("denoising_loss")


@torch.no_grad()
def denoising_loss(
    f: Tensor, x: Tensor, y: Tensor, sigma: Tensor, u: Tensor, sigma_data: float = 0.5, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each image, and the gradients of `scale` times its sum with respect to F and u (4.1).

    With D = c_skip * x + c_out * F (3.4) the loss of an image is the sum over its elements of (lambda / exp(u)) * (D -
    y)^2 + u, lambda = 1 / c_out^2. F, x (noisy) and y (clean) are [N, C, H, W], in layouts and dtypes of their own,
    sigma and the network's uncertainty u have N elements, in any shape.

    Returns the loss [N] in float32 (float64 for float64 F), the gradient of F like F, and that of u like u. They are
    for `torch.autograd.backward([f, u], [grad_f, grad_u])`; nothing is recorded here, and D is never stored.
    `reference.denoising_loss_map` is the differentiable formula. Raises ValueError or TypeError if a shape or dtype
    does not fit or sigma_data is not positive.
    """
    checks.loss_arguments(f, x, y, sigma, u, sigma_data)
    exact = reference.image_dtype(f.dtype)
    x = x.to(exact)
    if not backend.native(x, _KERNELS) or f.dtype not in backend.dtypes(x):
        return reference.denoising_loss(f, x, y, sigma, u, sigma_data, scale)
    levels = (sigma.to(exact).reshape(-1), u.to(exact).reshape(-1))
    loss, grad_f, grad_u = _loss(f, x, y.to(exact), *levels, sigma_data, scale)
    return loss, grad_f, grad_u.reshape(u.shape).to(u.dtype)


@backend.fake("denoising_loss")
def _(
    f: Tensor, x: Tensor, y: Tensor, sigma: Tensor, u: Tensor, sigma_data: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(f.shape == x.shape and y.shape == x.shape)
    return sigma.new_empty(sigma.shape), empty_output(f), u.new_empty(u.shape)
