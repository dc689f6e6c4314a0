"""Deterministic and stochastic sampling of a trained denoiser, with guidance and one random stream per image seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isfinite

import torch
from torch import Tensor

from python_train.guidance import Denoiser, Guide, GuidedDenoiser
from python_train.solvers import Churn, dpmpp_2m, dpmpp_2m_sde, euler, heun, noise_levels

SOLVERS = ("heun", "euler", "dpm++2m", "dpm++2m-sde")


def sample(
    net: Denoiser,
    noise: Tensor,
    labels: Tensor | None = None,
    guides: Sequence[Guide] = (),
    *,
    solver: str = "heun",
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = inf,
    S_noise: float = 1,
    dtype: torch.dtype = torch.float32,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Turn noise into samples (spec 6).

    Args:
        net: denoiser, called as ``net(x, sigma, labels)`` with x [N,...] in ``dtype`` and a 0-dim sigma.
        noise: [N,...], standard normal; images are [N,C,H,W].
        labels: [N,label_dim] one-hot, or None; given to all networks (spec 6.2).
        guides: guiding networks with their weights and intervals; skipped steps do not evaluate them.
        solver: one of `SOLVERS`, see `python_train.solvers`.
        num_steps: number N of noise levels; heun evaluates each network 2N - 1 times, the others N times.
        sigma_min, sigma_max, rho: noise levels, see `noise_levels`.
        S_churn, S_min, S_max, S_noise: amount, range and inflation of the noise that heun and euler add back at each
            step; 0 = none.
        dtype: of the solver; denoiser outputs are cast to it.
        randn_like: source of the churn or SDE noise, called once per step that needs it.

    Returns:
        samples [N,...] in ``dtype``. Gradients are recorded if autograd is on and the networks require them.

    Raises:
        ValueError: settings out of range, an unknown solver, or churn with a solver that has none.
        TypeError: dtype is not a floating-point type.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"sample: dtype must be a floating-point type, got {dtype}")
    if solver not in SOLVERS:
        raise ValueError(f"sample: solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if S_churn != 0 and solver not in ("heun", "euler"):
        raise ValueError(f"sample: S_churn is for heun and euler, not for {solver}; got {S_churn}")
    churn = Churn(S_churn, S_min, S_max, S_noise)
    exact_levels = noise_levels(num_steps, sigma_min, sigma_max, rho, dtype=torch.float64).tolist()
    denoise = GuidedDenoiser(net, guides, labels, exact_levels, dtype, noise.device)
    levels = noise_levels(num_steps, sigma_min, sigma_max, rho, dtype=dtype, device=noise.device)
    x = noise.to(dtype) * levels[0]
    if solver == "dpm++2m":
        return dpmpp_2m(denoise, x, levels)
    if solver == "dpm++2m-sde":
        return dpmpp_2m_sde(denoise, x, levels, randn_like)
    return (heun if solver == "heun" else euler)(denoise, x, levels, churn, randn_like)


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
    """`sample` by Heun's method with at most one guide (spec 6.1; EDM Algorithm 2, EDM2 App. D.1).

    ``gnet`` is the guiding denoiser: D = guidance * net + (1 - guidance) * gnet, never called when guidance is 1. The
    other arguments and the result are those of `sample`. Raises ValueError for guidance that is not finite, or other
    than 1 without gnet.
    """
    if not isfinite(guidance):
        raise ValueError(f"edm_sampler: guidance must be finite, got {guidance}")
    if guidance != 1 and gnet is None:
        raise ValueError(f"edm_sampler: guidance={guidance} needs a guiding network gnet")
    return sample(
        net,
        noise,
        labels,
        [] if gnet is None else [Guide(gnet, guidance)],
        num_steps=num_steps,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        rho=rho,
        S_churn=S_churn,
        S_min=S_min,
        S_max=S_max,
        S_noise=S_noise,
        dtype=dtype,
        randn_like=randn_like,
    )


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
