"""What the emulation needs; one thread for torch, whose tensors here are too small for more."""

import shutil
import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _environment() -> Iterator[None]:
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("the emulation of CUDA needs Linux and g++ (no CUDA toolkit)")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
