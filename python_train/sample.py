"""Deterministic and stochastic sampling of a trained denoiser, with guidance and one random stream per image seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from edm2ext import ops
from python_train.network import Precond

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def noise_levels(
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise levels t_0 = sigma_max > ... > t_{N-1} = sigma_min, t_N = 0 of the sampler (spec 6.1; EDM Eq. 5).

    Returns a tensor [num_steps + 1] of the given dtype. Raises ValueError for fewer than 2 steps or limits that are
    not 0 < sigma_min < sigma_max, rho > 0.
    """
    if num_steps < 2:
        raise ValueError(f"noise_levels: num_steps must be at least 2, got {num_steps}")
    if not 0 < sigma_min < sigma_max < inf:
        raise ValueError(f"noise_levels: expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if not 0 < rho < inf:
        raise ValueError(f"noise_levels: rho must be positive, got {rho}")
    ramp = torch.arange(num_steps, dtype=dtype, device=device) / (num_steps - 1)
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (start + ramp * (end - start)) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def edm_sampler(
    net: Denoiser,
    noise: Tensor,
    labels: Tensor | None = None,
    gnet: Denoiser | None = None,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    guidance: float = 1,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = inf,
    S_noise: float = 1,
    dtype: torch.dtype = torch.float32,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Turn noise into samples with Heun's 2nd-order method (spec 6.1; EDM Algorithm 2, EDM2 App. D.1).

    Args:
        net: denoiser, called as ``net(x, sigma, labels)`` with x [N,C,H,W] in ``dtype`` and a 0-dim sigma.
        noise: [N,C,H,W], standard normal.
        labels: [N,label_dim] one-hot, or None; given to both networks (spec 6.2).
        gnet: guiding denoiser; D = guidance * net + (1 - guidance) * gnet. Never called when guidance is 1.
        num_steps: number N of noise levels; the denoiser is evaluated 2N - 1 times.
        sigma_min, sigma_max, rho: noise levels, see `noise_levels`.
        S_churn, S_min, S_max, S_noise: amount, range and inflation of the noise added back at each step; 0 = none.
        dtype: of the solver; denoiser outputs are cast to it.
        randn_like: source of the churn noise, called once per churned step.

    Returns:
        samples [N,C,H,W] in ``dtype``. Gradients are recorded if autograd is on and the networks require them.

    Raises:
        ValueError: guidance other than 1 without gnet, or settings out of range.
        TypeError: dtype is not a floating-point type.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"edm_sampler: dtype must be a floating-point type, got {dtype}")
    if not isfinite(guidance):
        raise ValueError(f"edm_sampler: guidance must be finite, got {guidance}")
    if guidance != 1 and gnet is None:
        raise ValueError(f"edm_sampler: guidance={guidance} needs a guiding network gnet")
    if S_churn < 0:
        raise ValueError(f"edm_sampler: S_churn must not be negative, got {S_churn}")

    network = _network_input(net, noise.device)
    shared = network is not None and gnet is not None and network == _network_input(gnet, noise.device)

    def denoise(x: Tensor, t: Tensor, x_in: Tensor | None) -> dict[str, Any]:
        """D(x; t) of the networks, and how the step blends them."""
        denoised = _denoise(net, x, t, labels, x_in).to(dtype)
        if guidance == 1:
            return {"denoised": denoised}
        guide = _denoise(gnet, x, t, labels, x_in if shared else None).to(dtype)
        return {"denoised": denoised, "guide": guide, "guidance": guidance}

    t_steps = noise_levels(num_steps, sigma_min, sigma_max, rho, dtype=dtype, device=noise.device)
    churn = [0.0] * num_steps
    if S_churn > 0:
        churned = (t_steps >= S_min) & (t_steps <= S_max)
        churn = [min(S_churn / num_steps, sqrt(2) - 1) if within else 0.0 for within in churned[:-1].tolist()]
    x_hat = noise.to(dtype) * t_steps[0]
    if churn[0]:
        x_hat = x_hat + ((t_steps[0] * (1 + churn[0])) ** 2 - t_steps[0] ** 2).sqrt() * S_noise * randn_like(x_hat)
    x_in = None
    for i, (t, t_next) in enumerate(pairwise(t_steps[:-1])):
        t_hat = t * (1 + churn[i])
        step = partial(ops.sampler_step, t_hat=t_hat, t_next=t_next, network=network)
        x, x_in = step(x_hat, **denoise(x_hat, t_hat, x_in))
        heun = denoise(x, t_next, x_in)
        added = {"noise": randn_like(x), "churn": churn[i + 1], "S_noise": S_noise} if churn[i + 1] else {}
        x_hat, x_in = step(x, **heun, start=x_hat, **added)
    t_hat = t_steps[-2] * (1 + churn[-1])
    return ops.sampler_step(x_hat, **denoise(x_hat, t_hat, x_in), t_hat=t_hat, t_next=t_steps[-1])[0]


def _network_input(net: Denoiser, device: torch.device) -> ops.NetworkInput | None:
    """How the network takes its input, if a step of the sampler can make it."""
    return net.network_input(device) if isinstance(net, Precond) else None


def _denoise(net: Denoiser, x: Tensor, t: Tensor, labels: Tensor | None, x_in: Tensor | None) -> Tensor:
    """D(x; t), of the network input ``x_in`` where the last step made it."""
    return net.denoise(x, t, labels, x_in) if isinstance(net, Precond) and x_in is not None else net(x, t, labels)


class SeededRandom:
    """One random stream per image, so that an image depends on its seed and not on its batch (spec 6.4).

    Generators live on the sampling device: CPU and CUDA give different images for the same seed.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed) % 2**32) for seed in seeds]

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal tensor [seeds, *shape]."""
        draws = [torch.randn(*shape, dtype=dtype, device=self.device, generator=g) for g in self.generators]
        return torch.stack(draws)

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal tensor of x's shape [seeds, ...] and dtype."""
        return self.randn(x.shape[1:], dtype=x.dtype)

    def randint(self, high: int) -> Tensor:
        """Integers [seeds], int64, uniform in [0, high)."""
        return torch.stack([torch.randint(high, (), device=self.device, generator=g) for g in self.generators])
