"""The optimizer step as one CUDA graph: its hundreds of launches, accumulation rounds included, are replayed as one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from python_train import UserError
from python_train.config import TrainOptions
from python_train.trainer import Trainer
from python_train.world import World

Step = Callable[[Iterator[tuple[Tensor, Tensor]]], None]
# Eager steps before the capture: allocations settle, libraries choose their kernels; DDP has its buckets after 11.
WARM_UP, WARM_UP_DDP = 3, 11


class Graph(Protocol):
    """Launches that were captured."""

    def replay(self) -> None:
        """Run them again, on what their buffers now hold."""


def check(options: TrainOptions, world: World) -> None:
    """Raises UserError for a graph on anything but a GPU."""
    if options.cuda_graph and world.device.type != "cuda":
        raise UserError(f"cuda-graph needs a GPU, and this run is on {world.device.type}")


def stepper(trainer: Trainer) -> Step:
    """What makes the trainer's steps, as its options ask; with shards eagerly in any case, gathered from hooks."""
    if not trainer.options.cuda_graph or trainer.shards is not None:
        return trainer.step
    return GraphedStep(trainer, _capture, WARM_UP_DDP if trainer.world.size > 1 else WARM_UP)


class GraphedStep:
    """`Trainer.step`, replayed from a graph after ``warm_up`` eager steps, which are real ones; so is the captured one,
    which the capture itself does not run.

    The graph holds what the device does with a step's micro-batches, which are copied to buffers of its own, and with
    the numbers that `FusedAdam.advance` sends before each replay: learning rate, bias corrections, averages' weights.
    Random numbers are drawn within, from generators that are reseeded before each replay (CUDA's take their seed from
    there). Micro-batches of another shape or dtype warm up and capture anew.
    """

    def __init__(
        self, trainer: Trainer, capture: Callable[[Callable[[], None]], Graph], warm_up: int = WARM_UP
    ) -> None:
        self.trainer = trainer
        self.capture = capture
        self.warm_up = warm_up
        self.form: list[tuple[torch.Size, torch.dtype]] = []
        self.eager_steps = 0
        self.graph: Graph | None = None
        self.inputs: list[tuple[Tensor, ...]] = []
        self.means = torch.empty(0)

    def __call__(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        trainer = self.trainer
        rounds = [next(batches) for _ in range(trainer.rounds)]
        form = [(x.shape, x.dtype) for tensors in rounds for x in tensors]
        if form != self.form:
            trainer.drop_gradients()
            self.form, self.eager_steps, self.graph = form, 0, None
        if self.eager_steps < self.warm_up:
            self.eager_steps += 1
            with _beside(trainer.world.device):
                trainer.step(iter(rounds))
            return
        if self.graph is None:
            self.inputs = [tuple(torch.empty_like(x) for x in tensors) for tensors in rounds]
            self.graph = self.capture(self._launches)
        for buffers, tensors in zip(self.inputs, rounds, strict=True):
            for buffer, x in zip(buffers, tensors, strict=True):
                buffer.copy_(x, non_blocking=True)
        trainer.reseed()
        trainer.optimizer.advance(trainer.next_averages())
        self.graph.replay()
        trainer.losses.append(self.means.clone())

    def _launches(self) -> None:
        """What the device does. The gradients stay: each replay makes them anew, in the same place."""
        means = [self.trainer.accumulate(index, *tensors) for index, tensors in enumerate(self.inputs)]
        self.trainer.optimizer.launch()
        self.means = torch.stack(means)


def _capture(launches: Callable[[], None]) -> Graph:
    graph = torch.cuda.CUDAGraph()
    # thread_local: meanwhile other threads pin the next batches and write a snapshot, which "global" takes for errors.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        launches()
    return graph


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Run on a stream beside the current one, as a capture wants what comes before it."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
