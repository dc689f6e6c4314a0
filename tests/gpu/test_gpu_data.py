"""Batches of a preloaded data set on a GPU."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from python_train.data.stream import IndexStream, batches

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU to test on", allow_module_level=True)


def test_as_on_the_cpu_and_without_waiting_for_the_device():
    images = torch.randint(0, 256, [10, 1, 4, 4], dtype=torch.uint8)
    dataset = SimpleNamespace(in_memory=(images, torch.eye(10)), xflip=True)

    def stream(device: str):
        return batches(dataset, 8, IndexStream(20, seed=1), torch.device(device))

    on_gpu = stream("cuda")
    found = [next(on_gpu)]  # moves the data
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += islice(on_gpu, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, expected in zip(found, stream("cpu"), strict=False):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))
