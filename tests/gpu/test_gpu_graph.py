"""The training step replayed from a CUDA graph is the eager step, bit for bit."""

import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import edm2ext
from python_train import graph
from python_train.config import make_options
from python_train.graph import GraphedStep, stepper
from python_train.loop import build_network
from python_train.trainer import Trainer
from python_train.world import World

pytestmark = pytest.mark.gpu
if not (edm2ext.build_info()["cuda"] and torch.cuda.is_available()):
    pytest.skip(f"no GPU to test on: {edm2ext.build_info()['cuda_reason']}", allow_module_level=True)

OPTIONS = make_options("digits", batch=16, duration=16 * 64, rampup=20, decay=1, dropout=0.1, precision="fp16")


@pytest.fixture(autouse=True)
def _deterministic():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(world: World, **overrides: object) -> Trainer:
    options = dataclasses.replace(OPTIONS, **overrides)
    torch.manual_seed(0)
    net = build_network(options, 8, 1, 10)
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.5)
    return Trainer(net.to(world.device), options, world=world)


def batches(size: int):
    generator = torch.Generator().manual_seed(1)
    while True:
        images = torch.randint(0, 256, [size, 1, 8, 8], dtype=torch.uint8, generator=generator)
        labels = torch.eye(10)[torch.randint(0, 10, [size], generator=generator)]
        yield images.cuda(), labels.cuda()


def assert_same(a: Trainer, b: Trainer):
    for xs, ys in zip((a.params, *a.ema.profiles), (b.params, *b.ema.profiles), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("force_normalize", "batch_gpu"), [("forward", 4), ("step", None)])
def test_replayed_steps_are_eager_steps(force_normalize: str, batch_gpu: int | None, recompute: bool):
    world = World(device=torch.device("cuda"))
    options = {"force_normalize": force_normalize, "batch_gpu": batch_gpu, "recompute": recompute}
    eager, replayed = make(world, **options), make(world, cuda_graph=True, **options)
    step = stepper(replayed)
    streams = batches(eager.micro_batch), batches(eager.micro_batch)
    for _ in range(10):
        eager.step(streams[0])
        step(streams[1])
    assert isinstance(step, GraphedStep)
    assert step.graph is not None
    assert eager.mean_loss() == replayed.mean_loss()
    assert_same(eager, replayed)


def test_another_shape_captures_anew():
    world = World(device=torch.device("cuda"))
    eager, replayed = make(world), make(world, cuda_graph=True)
    step = stepper(replayed)
    for size in (16, 8):
        streams = batches(size), batches(size)
        for _ in range(6):
            eager.step(streams[0])
            step(streams[1])
    assert_same(eager, replayed)


def test_another_thread_may_wait_for_copies_during_a_capture():
    """As the one that writes snapshots does."""
    stop = threading.Event()

    def wait_for_copies() -> int:
        count, source = 0, torch.ones(1000, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                count += 1
                torch.empty(1000, pin_memory=True).copy_(source, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                event.synchronize()
        return count

    trainer = make(World(device=torch.device("cuda")), cuda_graph=True)
    step, stream = stepper(trainer), batches(16)
    with ThreadPoolExecutor(1) as pool:
        copies = pool.submit(wait_for_copies)
        try:
            for _ in range(6):
                step(stream)
        finally:
            stop.set()
        assert copies.result() > 0
    assert step.graph is not None


def test_with_ddp_of_one_process(tmp_path: Path):
    world = World(device=torch.device("cuda"))
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        trainers = [make(world, cuda_graph=graphed) for graphed in (False, True)]
        for trainer in trainers:
            trainer.raw = trainer._replicated()
        step = GraphedStep(trainers[1], graph._capture, graph.WARM_UP_DDP)
        streams = batches(16), batches(16)
        for _ in range(graph.WARM_UP_DDP + 4):
            trainers[0].step(streams[0])
            step(streams[1])
        assert_same(*trainers)
    finally:
        torch.distributed.destroy_process_group()


def test_replays_do_not_wait_for_the_device():
    world = World(device=torch.device("cuda"))
    trainer = make(world, cuda_graph=True)
    step, stream = stepper(trainer), batches(16)
    for _ in range(5):
        step(stream)
    given = [next(stream) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pair in given:
            step(iter([pair]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
