"""EDM2's guided sampler as the papers write it, in plain torch; and our own with its networks in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from edm2ext import ops
from python_train.guidance import Guide, GuidedDenoiser
from python_train.network import Precond
from python_train.sample import sample
from python_train.solvers import Denoised, heun, noise_levels

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Sampler = Callable[[], Tensor]
WARM_UP = 3  # evaluations before the capture


def published(main: Denoiser, guide: Denoiser, guidance: float, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Heun's method in fp32 (6.1; EDM Algorithm 2), guided at every evaluation (6.2)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return guide(x, t, labels).lerp(main(x, t, labels), guidance)

    levels = noise_levels(steps, device=noise.device)
    x = noise * levels[0]
    for index, (t, t_next) in enumerate(pairwise(levels)):
        d = (x - denoise(x, t)) / t
        x_next = x + (t_next - t) * d
        if index < steps - 1:
            d_next = (x_next - denoise(x_next, t_next)) / t_next
            x_next = x + (t_next - t) * (0.5 * d + 0.5 * d_next)
        x = x_next
    return x


def ours(main: Precond, guide: Precond, guidance: float, noise: Tensor, labels: Tensor, steps: int) -> Sampler:
    """The same by `python_train.sample`; on a GPU both networks are captured in one graph."""
    if noise.device.type != "cuda":
        return lambda: sample(main, noise, labels, [Guide(guide, guidance)], num_steps=steps)
    exact = noise_levels(steps, dtype=torch.float64).tolist()
    eager = GuidedDenoiser(main, [Guide(guide, guidance)], labels, exact, torch.float32, noise.device)
    captured = CapturedDenoiser(eager, noise, capture_on_gpu)
    levels = noise_levels(steps, device=noise.device)
    return lambda: heun(captured, noise * levels[0], levels)


class Graph(Protocol):
    """Launches that were captured."""

    def replay(self) -> None:
        """Run them again, on what their buffers now hold."""


class CapturedDenoiser:
    """Main network and guide as one graph, for a solver (`python_train.solvers.Denoise`). The guidance is the same at
    every step, and the networks take their input in one way."""

    def __init__(self, eager: GuidedDenoiser, like: Tensor, capture: Callable[[Callable[[], None]], Graph]) -> None:
        assert eager.network is not None
        self.network = eager.network
        self.x = torch.zeros_like(like)
        self.t = torch.ones((), device=like.device)
        self.x_in = ops.precondition_input(self.x, self.t, *self.network)

        def evaluate() -> None:
            self.result = eager(self.x, self.t, 0, self.x_in)

        self.graph = capture(evaluate)

    def __call__(self, x: Tensor, t: Tensor, step: int, x_in: Tensor | None = None) -> Denoised:
        """What the graph makes of copies of its inputs; the next call overwrites it."""
        self.x.copy_(x)
        self.t.copy_(t)
        self.x_in.copy_(ops.precondition_input(x, t, *self.network) if x_in is None else x_in)
        self.graph.replay()
        return self.result


def capture_on_gpu(launches: Callable[[], None]) -> Graph:
    """Captured after a warm-up on a stream beside the current one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            launches()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launches()
    return graph
