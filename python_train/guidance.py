"""Guidance by other networks (spec 6.2, 6.3): weights that may vary with the noise level, limited intervals.

D = D_main + sum_i (w_i - 1) (D_main - D_i), Eq. 6 of the autoguidance paper. An unconditional guide makes it
classifier-free guidance, a smaller or less trained one autoguidance. A weight is constant within a step and belongs to
the noise level at which the step starts; where it is 1, the guide is not evaluated. On a GPU each guide has a stream of
its own beside the main network's; on a CPU networks run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, log

import torch
from torch import Tensor

from edm2ext import ops
from python_train.network import Precond
from python_train.solvers import Denoised

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Weight = float | Sequence[float] | Callable[[float], float]
Interval = tuple[float, float] | range


@dataclass(frozen=True)
class Guide:
    """A guiding network and how strongly it guides.

    ``weight`` is a number (1 = no guidance, above 1 pushes away from the guide), one number for each step, or a
    function of the noise level. ``interval`` limits guidance to some steps: ``range(15, 22)`` names them;
    ``(sigma_lo, sigma_hi)`` are noise levels, each taken to mean the nearest one of the grid (published limits are
    rounded), and guides the steps that start in (sigma_lo, sigma_hi] (Eqs. 5 and 6 of the interval paper).
    """

    net: Denoiser
    weight: Weight
    interval: Interval | None = None

    def weights(self, levels: Sequence[float]) -> list[float]:
        """The weight of each step of the grid t_0 > ... > t_N = 0; 1 outside the interval.

        Raises ValueError for weights that are not finite or not one per step, and for an interval that holds no step.
        """
        num_steps = len(levels) - 1
        if callable(self.weight):
            weights = [float(self.weight(sigma)) for sigma in levels[:-1]]
        elif isinstance(self.weight, Sequence):
            weights = [float(weight) for weight in self.weight]
        else:
            weights = [float(self.weight)] * num_steps
        if len(weights) != num_steps:
            raise ValueError(f"guidance: expected one weight or {num_steps}, one for each step, got {len(weights)}")
        if not all(isfinite(weight) for weight in weights):
            raise ValueError(f"guidance must be finite, got {next(w for w in weights if not isfinite(w))}")
        if self.interval is None:
            return weights
        steps = interval_steps(self.interval, levels)
        return [weight if step in steps else 1.0 for step, weight in enumerate(weights)]


def interval_steps(interval: Interval, levels: Sequence[float]) -> range:
    """The steps of the grid t_0 > ... > t_N = 0 that an interval guides, see `Guide`.

    Raises ValueError if it is not an interval or holds no step of this grid.
    """
    num_steps = len(levels) - 1
    if isinstance(interval, range):
        if interval.step != 1 or not 0 <= interval.start < interval.stop <= num_steps:
            raise ValueError(
                f"guidance interval: steps must be within 0 to {num_steps - 1}, got "
                f"{interval.start} to {interval.stop - 1}"
            )
        return interval
    sigma_lo, sigma_hi = interval
    if not 0 <= sigma_lo < sigma_hi:
        raise ValueError(f"guidance interval: expected 0 <= sigma_lo < sigma_hi, got {sigma_lo:g} and {sigma_hi:g}")
    steps = range(_nearest(sigma_hi, levels), _nearest(sigma_lo, levels))
    if not steps:
        raise ValueError(f"guidance interval: no step starts within ({sigma_lo:g}, {sigma_hi:g}]")
    return steps


def _nearest(sigma: float, levels: Sequence[float]) -> int:
    """Index of the level nearest to sigma, by ratio; that of t_N = 0 for a sigma below all others."""
    if sigma < 0.99 * levels[-2]:
        return len(levels) - 1
    return min(range(len(levels) - 1), key=lambda index: abs(log(levels[index]) - log(sigma)))


def blended_weights(guidance: float, blend: float) -> tuple[float, float]:
    """The weights of two guides that share ``guidance``: 1 - blend of it for the first (the unconditional one), blend
    for the second (the bad version of the main network), Eq. 6 of the autoguidance paper.

    Raises ValueError unless 0 <= blend <= 1.
    """
    if not 0 <= blend <= 1:
        raise ValueError(f"blended_weights: blend must be between 0 and 1, got {blend}")
    return (1 - blend) * (guidance - 1) + 1, blend * (guidance - 1) + 1


class GuidedDenoiser:
    """The networks together, as the solvers call them (`python_train.solvers.Denoise`).

    All get the labels; their outputs are cast to ``dtype``. ``levels`` is the grid t_0 > ... > t_N = 0.
    """

    def __init__(
        self,
        net: Denoiser,
        guides: Sequence[Guide],
        labels: Tensor | None,
        levels: Sequence[float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.net, self.guides, self.labels, self.dtype = net, guides, labels, dtype
        self.weights = [guide.weights(levels) for guide in guides]
        self.network = _network_input(net, device)
        self._shares = [_network_input(guide.net, device) == self.network for guide in guides]
        self._streams = [_side_stream(device) for _ in guides]

    def __call__(self, x: Tensor, t: Tensor, step: int, x_in: Tensor | None = None) -> Denoised:
        """Evaluate the main network and the guides of this step at noise level t."""
        active = [i for i, weights in enumerate(self.weights) if weights[step] != 1]
        guided = [(self._evaluate_beside(i, x, t, x_in), self.weights[i][step]) for i in active]
        D_main = self._evaluate(self.net, x, t, x_in)
        for i in active:
            if (stream := self._streams[i]) is not None:
                torch.cuda.current_stream(x.device).wait_stream(stream)
        if not guided:
            return Denoised(D_main)
        if len(guided) == 1:
            return Denoised(D_main, *guided[0])
        return Denoised(D_main + sum((w - 1) * (D_main - D_guide) for D_guide, w in guided))

    def _evaluate_beside(self, i: int, x: Tensor, t: Tensor, x_in: Tensor | None) -> Tensor:
        """A guide's output. On a GPU its stream begins when the current one has come here, which must wait for it in
        turn: then memory that one of them frees is not reused before the other is done with it."""
        stream = self._streams[i]
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):  # None: does nothing
            return self._evaluate(self.guides[i].net, x, t, x_in if self._shares[i] else None)

    def _evaluate(self, net: Denoiser, x: Tensor, t: Tensor, x_in: Tensor | None) -> Tensor:
        D = net(x, t, self.labels) if x_in is None else net.denoise(x, t, self.labels, x_in)
        return D.to(self.dtype)


def _network_input(net: Denoiser, device: torch.device) -> ops.NetworkInput | None:
    """How the network takes its input, if a step of the sampler can make it."""
    return net.network_input(device) if isinstance(net, Precond) else None


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside the current one; None where there are none."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
