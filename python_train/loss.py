"""The training loss (spec 4.1; EDM2 paper Eqs. 14-16, 21)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edm2ext import ops

SIGMA_DATA = 0.5


class EDM2Loss:
    """Denoising error weighted by lambda(sigma) = 1 / c_out^2 and by the network's own uncertainty u(sigma).

    Noise levels are log-normal: sigma = exp(P_mean + P_std * N(0, 1)).
    """

    def __init__(self, P_mean: float = -0.4, P_std: float = 1.0, sigma_data: float = SIGMA_DATA) -> None:
        self.P_mean = P_mean
        self.P_std = P_std
        self.sigma_data = sigma_data

    def __call__(self, net: Callable[..., tuple[Tensor, Tensor]], images: Tensor, labels: Tensor | None) -> Tensor:
        """Loss map [N, C, H, W] for clean images of the network's domain.

        Draws from the global generator of the images' device: sigma's normal [N, 1, 1, 1], then the noise's (spec 4.6).
        """
        return self.at(net, images, labels, *self._draw(images))

    def backward(
        self, net: Callable[..., tuple[Tensor, Tensor]], images: Tensor, labels: Tensor | None, scale: float | Tensor
    ) -> Tensor:
        """Add the gradient of ``scale`` * sum(loss map) to the parameters; returns the map's mean, 0-dim. A scale that
        changes from step to step is a 0-dim float32 tensor on the images' device.

        ``net`` returns F and u (`Precond.raw`): the denoised image and the map are never stored. Draws like a call.
        """
        return self.backward_at(net, images, labels, *self._draw(images), scale)

    def _draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma(torch.randn([images.shape[0], 1, 1, 1], device=images.device))
        return sigma, torch.randn_like(images)

    def sigma(self, rnd_normal: Tensor) -> Tensor:
        """Noise levels for standard normal numbers."""
        return (rnd_normal * self.P_std + self.P_mean).exp()

    def at(
        self,
        net: Callable[..., tuple[Tensor, Tensor]],
        images: Tensor,
        labels: Tensor | None,
        sigma: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Loss map [N, C, H, W] at given noise levels sigma [N, 1, 1, 1] and standard normal noise [N, C, H, W]."""
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        denoised, logvar = net(images + noise * sigma, sigma, labels, return_logvar=True)
        return (weight / logvar.exp()) * (denoised - images) ** 2 + logvar

    def backward_at(
        self,
        net: Callable[..., tuple[Tensor, Tensor]],
        images: Tensor,
        labels: Tensor | None,
        sigma: Tensor,
        noise: Tensor,
        scale: float | Tensor,
    ) -> Tensor:
        """:meth:`backward` at given noise levels sigma [N, 1, 1, 1] and standard normal noise [N, C, H, W]."""
        noisy = images + noise * sigma
        F_x, logvar = net(noisy, sigma, labels)
        on_device = isinstance(scale, Tensor)
        factor = 1.0 if on_device else scale
        loss, *gradients = ops.denoising_loss(F_x, noisy, images, sigma, logvar, self.sigma_data, factor)
        mean = loss.sum() / images.numel()
        if on_device:  # in float32: 2^16 is beyond float16
            gradients = [(gradient.float() * scale).to(gradient.dtype) for gradient in gradients]
        torch.autograd.backward([F_x, logvar], gradients)
        return mean
