"""The energy model of the toy system and its training by exact score matching (spec 11.2, 11.3)."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edm2ext import ops
from edm2ext.nn import MPLinear
from edm2ext.phema import PowerEMA
from python_train.toy.distribution import TreeMixture

SIGMA_DATA = 0.5
P_MEAN, P_STD = -2.3, 1.5  # of the training noise's log-normal distribution
BATCH, LEARNING_RATE, DECAY_AFTER, SIGMA_REL = 4096, 0.01, 512, 0.010
# g keeps the sign of its first iterations. A positive one makes no density, since G grows without bound far away, and
# fits worse: from 0 it is a matter of chance, from here it came out negative for every seed tried.
FIRST_GAIN = -0.03


class ToyModel(torch.nn.Module):
    """G(x; sigma), the logarithm of a density but for a constant; its gradient is the score.

    ``width`` is that of the five magnitude-preserving layers.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([MPLinear(4, width), *(MPLinear(width, width) for _ in range(4))])
        self.gain = torch.nn.Parameter(torch.tensor(FIRST_GAIN))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """G [N] of points x [N, 2] at noise levels sigma (0-dim or [N]); Eq. 14 of the autoguidance paper."""
        sigma = sigma.to(x.dtype).expand(len(x))
        x = x / (sigma**2 + SIGMA_DATA**2).sqrt()[:, None]
        first, *others = self.layers
        h = first(torch.cat([x, (sigma.log() / 4)[:, None], torch.ones_like(x[:, :1])], dim=1))
        for layer in others:
            h = layer(ops.mp_silu(h))
        return self.gain * h.square().mean(1) / sigma - x.square().sum(1) / 2

    def score(self, x: Tensor, sigma: Tensor, create_graph: bool = False) -> Tensor:
        """The gradient of G with respect to x, [N, 2]; differentiable itself with ``create_graph``."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self(x, sigma).sum(), x, create_graph=create_graph)[0]

    def denoise(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """D(x; sigma) = x + sigma^2 score, for `python_train.sample.sample`."""
        return x + sigma**2 * self.score(x.to(self.gain.dtype), sigma)


class Recipe(NamedTuple):
    """What one of the three models is and learns (spec 11.3)."""

    classes: str
    width: int
    iterations: int


RECIPES = {
    "main": Recipe("A", 64, 4096),
    "autoguide": Recipe("A", 32, 512),
    "cfg-guide": Recipe("AB", 32, 512),
}


def noisy_batch(
    truth: TreeMixture, batch: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Points x [batch, 2] ~ p(x; sigma) with their noise levels [batch] and exact scores [batch, 2]."""
    device = truth.means.device
    sigma = (P_MEAN + P_STD * torch.randn(batch, generator=generator, device=device)).exp()
    x = truth.sample(batch, sigma, generator)
    return x, sigma, truth.score(x, sigma)


def score_matching_loss(model: ToyModel, x: Tensor, sigma: Tensor, score: Tensor, training: bool = False) -> Tensor:
    """E[sigma^2 mean_dim (score of the model - score)^2], 0-dim; Eq. 15 of the autoguidance paper."""
    error = model.score(x, sigma, create_graph=training) - score
    return (sigma[:, None] ** 2 * error.square()).mean()


def learning_rate(iteration: int) -> float:
    """Of the iteration with this number, counted from 0."""
    return LEARNING_RATE / sqrt(max(iteration / DECAY_AFTER, 1))


def train(
    recipe: Recipe, seed: int = 0, device: torch.device | str = "cpu", progress: Callable[[], Any] = lambda: None
) -> ToyModel:
    """Train a model by exact score matching; returns it with its averaged weights, in eval mode.

    ``progress`` is called after every iteration. Weights and data are drawn from one stream, in this order.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = ToyModel(recipe.width).to(device).train()
        truth = TreeMixture(recipe.classes, device)
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
        ema = PowerEMA(model.parameters(), [SIGMA_REL])
        for iteration in range(recipe.iterations):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(iteration)
            loss = score_matching_loss(model, *noisy_batch(truth, BATCH), training=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(nimg_next=iteration + 1, batch=1)
            progress()
    with torch.no_grad():
        for param, average in zip(model.parameters(), ema.profiles[0], strict=True):
            param.copy_(average)
    return model.eval().requires_grad_(False)
