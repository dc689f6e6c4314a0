"""What the emulation needs; one thread for torch, whose tensors here are too small for more."""

import shutil
import sys
from collections.abc import Iterator
from types import SimpleNamespace

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


@pytest.fixture(scope="session")
def ops() -> SimpleNamespace:
    """torch.ops.edm2_emulated, the CUDA half of the torch layer registered for CPU tensors on emulated kernels. Loaded
    once per process: a library cannot be registered twice."""
    import emulated

    kernels = ["pixel_norm", "mp_silu", "mp_sum", "mp_cat", "mp_fourier", "resample", "resample_down_pixel_norm"]
    kernels += [
        "cosine_attention",
        "ema_update",
        "adam_step",
        "accumulate_snapshots",
        "precondition",
        "denoising_loss",
        "sampler_step",
        "mp_conv2d",
    ]  # adam_step has normalize_weight
    torch.ops.load_library(emulated.build("bindings", *kernels))
    return torch.ops.edm2_emulated
