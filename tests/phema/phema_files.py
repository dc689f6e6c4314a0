"""A small module in training, whose averages are stored as files: what the tests of post-hoc EMA share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edm2ext.phema import PowerEMA

TRACKED = (0.05, 0.10)
BATCH = 32


@dataclass(frozen=True)
class Run:
    """Files of the tracked averages (two a time, the untrained network's first), and averages tracked directly."""

    files: list[Path]
    ema: PowerEMA

    def directly(self, sigma_rel: float) -> Tensor:
        return flat(self.ema.averages(sigma_rel))


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """All values as one vector in float64."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def small_net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.SiLU(), torch.nn.Linear(24, 24), torch.nn.Linear(24, 4))


def train(
    folder: Path,
    times: int,
    steps_between: int,
    also: Sequence[float] = (),
    storage: str = "fp32",
    tracked: Sequence[float] = TRACKED,
    after_step: Callable[[torch.nn.Module], None] = lambda net: None,
) -> Run:
    """Train for some steps on noisy data by steps of about the same size, storing the averages at so many times."""
    net, teacher = small_net(), small_net()
    squares = [torch.zeros_like(param) for param in net.parameters()]
    ema = PowerEMA(net, (*tracked, *also))
    files: list[Path] = []

    def save() -> None:
        part = PowerEMA(net, tracked)
        part.profiles, part.nimg, part.updates = ema.profiles[: len(tracked)], ema.nimg, ema.updates
        part.save(lambda sigma_rel: folder / f"{ema.nimg:06d}-{sigma_rel:.3f}.safetensors", storage=storage)
        files.extend(folder / f"{ema.nimg:06d}-{sigma_rel:.3f}.safetensors" for sigma_rel in tracked)

    save()
    steps = times * steps_between
    for step in range(1, steps + 1):
        x = torch.randn(BATCH, 8)
        loss = (net(x) - teacher(x).detach() - 0.3 * torch.randn(BATCH, 4)).square().mean()
        lr = 0.01 * min(step / 20, 1) / max(10 * step / steps, 1) ** 0.5
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for param, grad, square in zip(net.parameters(), grads, squares, strict=True):
                square.lerp_(grad**2, 1 / min(step, 50))
                param -= lr * grad / (square.sqrt() + 1e-8)
        after_step(net)
        ema.update(step * BATCH)
        if step % steps_between == 0:
            save()
    return Run(files, ema)
