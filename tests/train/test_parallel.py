"""Data-parallel training: several processes compute what one does, and their reductions overlap the backward pass."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from python_train.config import TrainOptions, make_options
from python_train.loop import build_network
from python_train.loss import EDM2Loss
from python_train.trainer import Trainer
from python_train.world import World

BATCH, STEPS = 12, 5


class Stored:
    """Noise levels and noise drawn once for the whole batch; a process takes the part of its rank."""

    def __init__(self, options: TrainOptions, world: World) -> None:
        generator = torch.Generator().manual_seed(1)
        draws = [[torch.randn(BATCH, c, s, s, generator=generator) for c, s in ((1, 1), (1, 8))] for _ in range(STEPS)]
        self.draws = iter([[draw.chunk(world.size)[world.rank] for draw in pair] for pair in draws])
        self.loss = EDM2Loss(options.P_mean, options.P_std)
        self.means: list[float] = []

    def backward(self, net: torch.nn.Module, images: Tensor, labels: Tensor, scale: float) -> Tensor:
        rnd_normal, noise = next(self.draws)
        mean = self.loss.backward_at(net, images, labels, self.loss.sigma(rnd_normal), noise, scale)
        self.means.append(float(mean))
        return mean


def train_on_stored(world: World, force_normalize: str) -> dict[str, object]:
    """Five steps: mean losses of this process, and gradients, weights and averages of all."""
    torch.set_num_threads(1)
    options = make_options(
        "digits", batch=BATCH, duration=BATCH * STEPS, rampup=0, force_normalize=force_normalize, lr=0.01
    )
    torch.manual_seed(world.rank)  # rank 0's weights are broadcast
    net = build_network(options, 8, 1, 10)
    torch.manual_seed(0)
    for name, param in build_network(options, 8, 1, 10).named_parameters() if world.rank == 0 else ():
        net.get_parameter(name).data.copy_(param)
    trainer = Trainer(net, options, world=world)
    trainer.loss = Stored(options, world)
    grads: list[list[Tensor]] = []
    step = trainer.optimizer.step

    def recording(weights: list[float]) -> None:
        grads.append([param.grad.clone() for param in trainer.params if param.grad is not None])
        step(weights)

    trainer.optimizer.step = recording
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, [BATCH, 1, 8, 8], dtype=torch.uint8, generator=generator)
    labels = torch.eye(10)[torch.randint(0, 10, [BATCH], generator=generator)]
    part = images.chunk(world.size)[world.rank], labels.chunk(world.size)[world.rank]
    for _ in range(STEPS):
        trainer.step(iter([part]))
    world.check_equal(net)
    return {
        "losses": trainer.loss.means,
        "grads": grads,
        "weights": [param.detach() for param in trainer.params],
        "averages": trainer.ema.profiles,
    }


def _process(rank: int, size: int, folder: str, force_normalize: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(train_on_stored(World(rank, size), force_normalize), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def processes(function: Callable[..., None], size: int, *arguments: object) -> None:
    """Run function(rank, size, *arguments) in as many processes, which are forked from one that has imported torch."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.checkpoint", "python_train.loop"])
    torch.multiprocessing.start_processes(function, (size, *arguments), nprocs=size, start_method="forkserver")


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Of all values as one vector."""
    flat = [torch.cat([x.double().flatten() for x in tensors]) for tensors in (got, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.mark.parametrize(("size", "force_normalize"), [(2, "forward"), (3, "step")])
def test_processes_compute_what_one_does(tmp_path: Path, size: int, force_normalize: str) -> None:
    processes(_process, size, str(tmp_path), force_normalize)
    alone = train_on_stored(World(), force_normalize)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    losses = torch.tensor([rank["losses"] for rank in ranks]).mean(dim=0)
    torch.testing.assert_close(losses, torch.tensor(alone["losses"]), rtol=1e-5, atol=0)
    for rank in ranks:
        for got, expected in zip(rank["grads"], alone["grads"], strict=True):
            assert relative_error(got, expected) <= 1e-5
        assert relative_error(rank["weights"], alone["weights"]) <= 1e-4
        for got, expected in zip(rank["averages"], alone["averages"], strict=True):
            assert relative_error(got, expected) <= 1e-4


def test_reduction_overlaps_the_backward_pass(tmp_path: Path) -> None:
    """The first gradients are on their way before the last ones are made."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        options = make_options("digits", batch=BATCH, duration=BATCH)
        trainer = Trainer(build_network(options, 8, 1, 10), options)
        trainer.raw = ddp = torch.nn.parallel.DistributedDataParallel(trainer.raw)
        events: list[str] = []

        def reduce(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
            events.append(f"bucket {bucket.index()}")
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        ddp.register_comm_hook(None, reduce)
        for name, param in zip(trainer.names, trainer.params, strict=True):
            if param.requires_grad:
                param.register_hook(lambda grad, name=name: events.append(name))
        images = torch.zeros([BATCH, 1, 8, 8], dtype=torch.uint8)
        for _ in range(2):  # buckets are made after the first pass, in the order in which gradients came
            events.clear()
            trainer.step(iter([(images, torch.eye(10)[torch.arange(BATCH) % 10])]))
    finally:
        torch.distributed.destroy_process_group()
    assert {"bucket 0", "bucket 1"} <= set(events)
    assert events.index("bucket 0") < events.index("unet.enc.8x8_conv.weight")
    assert events[-1].startswith("bucket")
