"""The CUDA kernels in the built library, read back without a GPU: present, registered, within their budgets."""

import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import edm2ext
from edm2ext import reference

# The most registers a kernel may use, over all its variants. With blocks of 256 threads, 32 registers fill a
# multiprocessor, 64 half of it, 80 leave room for three blocks and 128 for two.
REGISTERS = {
    "mp_silu_elements": 40,
    "mp_silu_backward_elements": 40,
    "mp_silu_modulated_columns": 48,
    "mp_silu_modulated_planes": 80,
    "mp_silu_modulated_backward_columns": 80,
    "mp_silu_modulated_backward_planes": 80,
    "mp_silu_modulated_add_chunks": 40,
    "pixel_norm_rows": 128,
    "pixel_norm_long_rows": 80,
    "pixel_norm_planes": 80,
    "pixel_norm_backward_rows": 255,  # up to 24 packs of 4 registers are held
    "pixel_norm_backward_long_rows": 80,
    "pixel_norm_backward_planes": 80,
    "mp_sum_elements": 40,
    "mp_sum_clipped_elements": 40,
    "mp_sum_backward_elements": 40,
    "mp_sum_clipped_backward_elements": 40,
    "mp_cat_units": 40,
    "mp_cat_backward_units": 40,
    "mp_fourier_elements": 32,
    "mp_fourier_backward_x": 40,
    "mp_fourier_backward_buffers": 48,
    "ema_update_chunks": 48,
    "normalize_weight_rows": 80,
    "normalize_weight_backward_rows": 128,
    "sum_gain_gradients": 40,
    "resample_down_cells": 40,
    "resample_up_cells": 40,
    "resample_gather": 64,
    "resample_down_pixel_norm_rows": 128,  # up to 64 means are held
    "resample_down_pixel_norm_long_rows": 80,
    "resample_down_pixel_norm_planes": 80,
    "resample_down_pixel_norm_backward_rows": 168,  # up to 8 packs of y and 64 gradients are held
    "resample_down_pixel_norm_backward_long_rows": 80,
    "resample_down_pixel_norm_backward_planes": 96,
    "qkv_norm_rows": 64,
    "qkv_norm_long_rows": 80,
    "qkv_norm_planes": 80,
    "qkv_norm_backward_rows": 80,
    "qkv_norm_backward_long_rows": 80,
    "qkv_norm_backward_planes": 96,
    "accumulate_snapshots_tiles": 80,
    "adam_rows": 128,
    "adam_gains": 80,
    "precondition_scale_units": 80,
    "precondition_output_units": 80,
    "denoising_loss_chunks": 64,
    "denoising_loss_samples": 40,
    "sampler_step_units": 80,
}
CONV_REGISTERS = {"mp_conv2d_tiles": 255, "mp_conv2d_add_parts": 80}  # with EDM2EXT_CONV
STATIC_SHARED_LIMIT = 48 * 1024
# These have dynamic shared memory too: they may declare what launch.h leaves them, beside the system's 1024 bytes.
WITH_DYNAMIC_SHARED = {"normalize_weight_rows", "normalize_weight_backward_rows", "adam_rows", "adam_gains"}
WITH_DYNAMIC_SHARED_LIMIT = 2 * 1024
OPS = [
    "pixel_norm",
    "pixel_norm_backward",
    "pixel_norm_silu",
    "pixel_norm_silu_backward",
    "mp_silu",
    "mp_silu_backward",
    "mp_silu_modulated",
    "mp_silu_modulated_backward",
    "mp_silu_modulated_dropout",
    "mp_silu_modulated_dropout_backward",
    "mp_sum",
    "mp_sum_clipped",
    "mp_sum_backward",
    "mp_cat",
    "mp_cat_backward",
    "mp_cat_silu",
    "mp_cat_silu_backward",
    "mp_fourier",
    "mp_fourier_backward",
    "ema_update_",
    "normalize_weight",
    "normalize_weight_backward",
    "effective_weight",
    "effective_weight_backward",
    "effective_weights",
    "effective_weights_backward",
    "force_normalize_",
    "prepare_weights",
    "resample_down",
    "resample_down_backward",
    "resample_up",
    "resample_up_backward",
    "resample_down_pixel_norm",
    "resample_down_pixel_norm_backward",
    "qkv_norm",
    "qkv_norm_backward",
    "accumulate_snapshots_",
    "adam_step_",
    "precondition_input",
    "precondition_output",
    "precondition_output_backward",
    "denoising_loss",
    "sampler_step",
    "sampler_step_input",
]


class Resources(NamedTuple):
    """What one variant of a kernel needs."""

    kernel: str
    arch: str
    registers: int
    stack: int
    shared: int
    local: int


CONV_OPS = [
    "mp_conv2d",
    "mp_conv2d_backward_input",
    "mp_conv2d_backward_weight",
    "mp_conv2d_silu_modulated",
    "mp_conv2d_sum",
    "mp_conv2d_qkv_norm",
    "mp_cat_conv2d",
    "mp_cat_conv2d_backward_weight",
]


def has_convolutions() -> bool:
    build = edm2ext.build_info()["build"]
    assert isinstance(build, dict), build
    return bool(build["conv"])


@pytest.fixture(scope="module")
def library() -> Path:
    info = edm2ext.build_info()
    if not info["cuda_compiled"]:
        pytest.skip("built without CUDA/nvcc")
    return Path(str(info["library"]))


def cuobjdump() -> str:
    """The tool, of a CUDA toolkit or of the package nvidia-cuda-cuobjdump."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found is not None:
        return found
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("cuobjdump is needed: pip install --requirement requirements.txt")
    return str(next(file for file in files if file.name == "cuobjdump").locate())


def read_back(library: Path) -> Iterator[Resources]:
    """Resources of every variant of every kernel in the library."""
    command = [cuobjdump(), "--dump-resource-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    arch = name = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function _ZN4edm24cuda(\d+)(\w+):", line):
            name = match[2][: int(match[1])]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            yield Resources(name, arch, *map(int, match.groups()))


@pytest.fixture(scope="module")
def kernels(library: Path) -> list[Resources]:
    return list(read_back(library))


def test_kernels_are_there_for_every_architecture(kernels: list[Resources]):
    archs = {f"sm_{arch}" for arch in str(edm2ext.build_info()["cuda_archs"]).split(";")}
    assert {k.arch for k in kernels} == archs
    expected = set(REGISTERS) | (set(CONV_REGISTERS) if has_convolutions() else set())
    for arch in archs:
        assert {k.kernel for k in kernels if k.arch == arch} == expected


def test_nothing_spills_and_budgets_hold(kernels: list[Resources]):
    for kernel in kernels:
        assert kernel.local == 0, kernel
        assert kernel.stack == 0, kernel
        assert kernel.registers <= {**REGISTERS, **CONV_REGISTERS}[kernel.kernel], kernel
        assert kernel.shared <= STATIC_SHARED_LIMIT, kernel
        assert kernel.kernel not in WITH_DYNAMIC_SHARED or kernel.shared <= WITH_DYNAMIC_SHARED_LIMIT, kernel


@pytest.mark.parametrize("op", OPS)
def test_registered_beside_the_cpu_kernel(library: Path, op: str):
    for key in ("CUDA", "CPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"edm2::{op}", key)


@pytest.mark.parametrize("op", CONV_OPS)
def test_convolutions_are_registered_where_they_were_built(library: Path, op: str):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"edm2::{op}", "CUDA") == has_convolutions()


@pytest.mark.parametrize("op", ["mp_cat_silu_only", "mp_cat_silu_only_backward"])
def test_registered_alone(library: Path, op: str):
    """Only convolutions on a GPU do without the concatenation."""
    for key in ("CUDA", "CPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"edm2::{op}", key) == (key == "CUDA")


def test_ops_work_on_cpu_tensors(library: Path):
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(torch.ops.edm2.pixel_norm(x, 1e-4), reference.pixel_norm(x))
    torch.testing.assert_close(torch.ops.edm2.mp_silu(x), reference.mp_silu(x))
