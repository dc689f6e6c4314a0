"""Halving with pixel norm and MP-SiLU, and the backward: the CUDA kernels under emulation against plain torch."""

from functools import partial
from typing import NamedTuple

import emulated
import pytest
import torch
from emulated import Guarded, Library
from test_emulated_resample import flat, image
from torch import Tensor

from edm2ext import reference

EPS = 1e-4


class Case(NamedTuple):
    """x is [n, c, height, width]; every tensor starts `offset` elements past a 16-byte boundary."""

    n: int
    c: int
    height: int
    width: int
    offset: int = 0
    layouts: tuple[str, ...] = ("nchw", "nhwc")


# One 16-byte pack holds 8 elements of 16 bits, or 4 of 32. Strips are of 32 cells, or 16 where packs hold 4.
CASES = [
    Case(1, 8, 2, 2),
    Case(2, 24, 5, 7),  # the last row and column have no partner; lanes left over in a group
    Case(1, 264, 4, 3, layouts=("nhwc",)),  # two packs a lane (16 bits), four (32 bits)
    Case(1, 520, 2, 2, layouts=("nhwc",)),  # four and eight
    Case(1, 1032, 2, 3, layouts=("nhwc",)),  # eight; too long for registers (32 bits)
    Case(1, 2056, 2, 2, layouts=("nhwc",)),  # too long for registers
    Case(2, 35, 5, 6),  # not made of packs
    Case(2, 70, 7, 32, layouts=("nchw",)),  # packs of neighbours, an odd row, several slices of channels
    Case(1, 66, 4, 48, layouts=("nchw",)),
    Case(1, 3, 3, 33, layouts=("nchw",)),  # packs but for the last column
    Case(2, 16, 4, 16, offset=1),  # no 16-byte access
    Case(3, 2, 46, 46),  # more strips than the grid has blocks
]


def forward(library: Library, x: Tensor, layout: str, offset: int) -> list[Tensor]:
    """y, mp_silu(y) and the rms, of x [N, C, H, W]."""
    n, c, height, width = x.shape
    shape = (n, c, height // 2, width // 2)
    source = Guarded(flat(x, layout), x.dtype, offset)
    outputs = [Guarded(n * c * shape[2] * shape[3], x.dtype, offset) for _ in range(2)]
    rms = Guarded(n * shape[2] * shape[3], torch.float32, 1)
    tensors = [t.tensor for t in (source, *outputs, rms)]
    library.call("resample_down_pixel_norm", *tensors, *x.shape, layout == "nhwc", x.dtype, EPS)
    for output in (*outputs, rms):
        output.check_margins()
    return [image(output.tensor, shape, layout) for output in outputs] + [rms.tensor.reshape(n, *shape[2:])]


def backward(
    library: Library, grads: list[Tensor], y: Tensor, rms: Tensor, size: tuple[int, ...], layout: str, offset: int
) -> list[Tensor]:
    """The gradient of x [*size]."""
    inputs = [Guarded(flat(t, layout), y.dtype, offset) for t in (*grads, y)]
    inputs.append(Guarded(rms, torch.float32, 1))
    grad_x = Guarded(torch.Size(size).numel(), y.dtype, offset)
    tensors = [t.tensor for t in (*inputs, grad_x)]
    library.call("resample_down_pixel_norm_backward", *tensors, *size, layout == "nhwc", y.dtype, EPS)
    grad_x.check_margins()
    return [image(grad_x.tensor, size, layout)]


def plain(x: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """Outputs, rms and gradient in plain torch, in x's dtype."""
    x = x.detach().requires_grad_()
    outputs = reference.resample_down_pixel_norm(x, eps=EPS)
    (grad_x,) = torch.autograd.grad(outputs, x, grads)
    rms = reference.resample_down(x.detach()).square().mean(1).sqrt()
    return [*(y.detach() for y in outputs), rms, grad_x]


def check(library: Library, case: Case, dtype: torch.dtype) -> None:
    """Forward and backward, in both layouts, under all schedules."""
    x = emulated.random_tensor(*case[:4], dtype=dtype)
    shape = (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2)
    grads = [emulated.random_tensor(*shape, dtype=dtype, seed=1 + i) for i in range(2)]
    exact, rounded = plain(x.double(), [grad.double() for grad in grads]), plain(x, grads)
    for layout in case.layouts:
        y, y_silu, rms = emulated.under_all_schedules(library, partial(forward, library, x, layout, case.offset))
        run = partial(backward, library, grads, y, rms, tuple(x.shape), layout, case.offset)
        results = [y, y_silu, rms, *emulated.under_all_schedules(library, run)]
        for name, out, low, high in zip(("y", "y_silu", "rms", "grad_x"), results, rounded, exact, strict=True):
            emulated.assert_as_accurate(out, low, high, f"{name}, {case} {dtype} {layout}")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("resample_down_pixel_norm")


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(library: Library, case: Case, dtype: torch.dtype):
    check(library, case, dtype)


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("number", range(5))
def test_one_misaligned_tensor(library: Library, number: int, dtype: torch.dtype):
    """Packs need every tensor aligned."""
    with emulated.misaligned(number):
        check(library, Case(1, 8, 4, 16), dtype)


def test_more_cells_than_the_grid_has_threads(library: Library):
    check(library, Case(1, 4, 184, 180, layouts=("nhwc",)), torch.float32)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 0, 4, 4)], ids=str)
def test_empty(library: Library, shape: tuple[int, ...], layout: str):
    x = torch.empty(shape)
    before = library.launches()
    y, y_silu, rms = forward(library, x, layout, 0)
    assert backward(library, [y, y_silu], y, rms, shape, layout, 0)[0].shape == shape
    assert library.launches() == before


@pytest.mark.parametrize("c", [8, 3, 2056])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_zero_pixels_have_zero_subgradient(library: Library, layout: str, c: int):
    x = torch.zeros(1, c, 2, 16)
    y, y_silu, rms = forward(library, x, layout, 0)
    assert all(out.count_nonzero() == 0 for out in (y, y_silu, rms))
    (grad,) = backward(library, [torch.ones_like(y), y], y, rms, tuple(x.shape), layout, 0)
    torch.testing.assert_close(grad, torch.full_like(x, 0.25 / EPS))
