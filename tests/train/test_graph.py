"""The step replayed from a graph, on a CPU: a tape stands in for the CUDA graph. It records the ops that reach the
dispatcher and runs them again on the same memory, so that a number or a buffer that a graph would freeze is frozen."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from python_train import UserError, data, graph
from python_train.config import make_options
from python_train.loop import build_network, train
from python_train.trainer import Trainer


class Tape(TorchDispatchMode):
    """What a function did to memory. Like a capture it leaves no trace of its own in what was there before."""

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__()
        self.records: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        generator = torch.get_rng_state()
        with self:
            function()
        torch.set_rng_state(generator)
        for x, values in self._before.values():
            x.untyped_storage().copy_(values.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a capture cannot wait for the device")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for x in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
                    storage = x.untyped_storage()
                    if storage._cdata not in self._made and storage._cdata not in self._before:
                        whole = torch.empty(0, dtype=torch.uint8).set_(storage.clone())
                        self._before[storage._cdata] = (x, whole)
        results = func(*args, **kwargs)
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        outputs = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in inputs]
        self._made |= {x.untyped_storage()._cdata for x in fresh}
        mutates = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if fresh or mutates:
            self.records.append((func, args, kwargs, outputs if fresh else []))
        return results

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, outputs in self.records:
                results = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for x, result in zip(outputs, results, strict=False):
                    if x.data_ptr() != result.data_ptr():
                        x.copy_(result)


OPTIONS = make_options(
    "digits",
    model_channels=16,
    num_blocks=1,
    batch=8,
    duration=8 * 8,
    rampup=20,
    decay=1,
    dropout=0.1,
)


def make(**overrides: object) -> Trainer:
    options = dataclasses.replace(OPTIONS, **overrides)
    torch.manual_seed(0)
    net = build_network(options, 8, 1, 10)
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.5)
    return Trainer(net, options)


def batches(size: int, dtype: torch.dtype = torch.uint8):
    generator = torch.Generator().manual_seed(1)
    while True:
        images = torch.randint(0, 256, [size, 1, 8, 8], generator=generator).to(dtype)
        yield images, torch.eye(10)[torch.randint(0, 10, [size], generator=generator)]


def state(trainer: Trainer) -> list[Tensor]:
    moments = [x for entry in trainer.optimizer.state.values() for x in entry.values()]
    averages = [x for profile in trainer.ema.profiles for x in profile]
    return [*(p.detach() for p in trainer.params), *moments, *averages, trainer.optimizer.nonfinite]


@pytest.mark.parametrize(("force_normalize", "batch_gpu"), [("forward", 4), ("step", None)])
def test_replayed_steps_are_eager_steps(force_normalize: str, batch_gpu: int | None) -> None:
    """Bit for bit, with learning rate, averages' weights, data and random numbers of their own each."""
    eager, replayed = (make(force_normalize=force_normalize, batch_gpu=batch_gpu) for _ in range(2))
    tapes = []
    step = graph.GraphedStep(replayed, lambda launches: tapes.append(Tape(launches)) or tapes[-1], warm_up=2)
    streams = batches(eager.micro_batch), batches(eager.micro_batch)
    for count in range(6):
        eager.step(streams[0])
        step(streams[1])
        assert eager.lr == replayed.lr
        assert len(tapes) == (count >= 2)
        assert all(torch.equal(a, b) for a, b in zip(state(eager), state(replayed), strict=True)), count
    assert eager.mean_loss() == replayed.mean_loss()


def test_another_shape_captures_anew() -> None:
    eager, replayed = make(batch=4), make(batch=4)
    tapes = []
    step = graph.GraphedStep(replayed, lambda launches: tapes.append(Tape(launches)) or tapes[-1], warm_up=1)
    images = itertools.chain(
        itertools.islice(batches(4), 3), itertools.islice(batches(2), 3), itertools.islice(batches(2, torch.float32), 2)
    )
    for pair in images:
        eager.step(iter([pair]))
        step(iter([pair]))
        assert all(torch.equal(a, b) for a, b in zip(state(eager), state(replayed), strict=True))
    assert len(tapes) == 3


def test_a_graph_needs_a_gpu(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, cuda_graph=True, status=8, snapshot=0, checkpoint=0)
    with pytest.raises(UserError, match="this run is on cpu"):
        train(options, data.open_dataset("digits", True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_who_replays() -> None:
    """Whoever was asked to, but with FSDP nobody."""
    eager, trainer = make(), make(cuda_graph=True)
    assert graph.stepper(eager) == eager.step
    assert isinstance(graph.stepper(trainer), graph.GraphedStep)
    trainer.shards = object()
    assert graph.stepper(trainer) == trainer.step
