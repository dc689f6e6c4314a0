"""Pixel norm and its backward: the CUDA kernels under emulation against the reference in float64."""

import itertools
import math
from functools import partial
from typing import NamedTuple

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

EPS = 1e-4


class Case(NamedTuple):
    """x is [n, c, p]; every tensor starts `offset` elements past a 16-byte boundary."""

    n: int
    c: int
    p: int
    offset: int = 0
    eps: float = EPS
    layouts: tuple[str, ...] = ("nchw", "nhwc")


# One 16-byte pack holds 8 elements of 16 bits, or 4 of 32.
CASES = [
    Case(1, 1, 1, eps=0.3),  # the gradient of one channel vanishes with eps
    Case(2, 3, 5),  # fewer channels than a pack
    Case(1, 8, 7),  # one lane a pixel
    Case(2, 24, 33),  # lanes left over in a group, pixels left over in a block
    Case(2, 72, 16),  # strips of whole packs, several slices of channels
    Case(1, 264, 6),  # two packs a lane
    Case(1, 520, 3),  # four packs a lane (16 bits), eight (32 bits)
    Case(1, 1032, 2),  # eight packs a lane (16 bits), too long for registers (32 bits)
    Case(1, 2056, 2),  # too long for registers
    Case(2, 100, 9),  # long rows starting at every alignment
    Case(3, 70, 64),  # more channels than slices
    Case(2, 24, 16, offset=1),  # no 16-byte access at the start
    Case(1, 43, 40, offset=3),
    Case(1, 8, 8300, layouts=("nhwc",)),  # more work than the grid has blocks: packs in registers
    Case(1, 3, 1101),  # long rows; single elements in planes
    Case(1, 3, 1064, layouts=("nchw",)),  # packs in planes
]


def forward(
    library: Library, x: Tensor, channels_last: bool, silu: bool, offset: int = 0, eps: float = EPS
) -> list[Tensor]:
    """y, or y and mp_silu(y), of x [N, C, P]."""
    source = Guarded(emulated.to_memory(x, channels_last), x.dtype, offset)
    outputs = [Guarded(x.numel(), x.dtype, offset) for _ in range(1 + silu)]
    y_silu = outputs[1].tensor if silu else None
    library.call("pixel_norm", source.tensor, outputs[0].tensor, y_silu, *x.shape, channels_last, x.dtype, eps)
    for output in outputs:
        output.check_margins()
    return [emulated.from_memory(output.tensor, x.shape, channels_last) for output in outputs]


def backward(
    library: Library, grads: list[Tensor], x: Tensor, channels_last: bool, offset: int = 0, eps: float = EPS
) -> list[Tensor]:
    """The gradient of x, given that of y, or those of y and mp_silu(y)."""
    inputs = [Guarded(emulated.to_memory(t, channels_last), x.dtype, offset) for t in [*grads, x]]
    grad_x = Guarded(x.numel(), x.dtype, offset)
    grad_silu = inputs[1].tensor if len(grads) == 2 else None
    arguments = (inputs[0].tensor, grad_silu, inputs[-1].tensor, grad_x.tensor)
    library.call("pixel_norm_backward", *arguments, *x.shape, channels_last, x.dtype, eps)
    grad_x.check_margins()
    return [emulated.from_memory(grad_x.tensor, x.shape, channels_last)]


def plain(x: Tensor, grads: list[Tensor], eps: float) -> tuple[list[Tensor], Tensor]:
    """Outputs and gradient in plain torch, in x's dtype."""
    x = x.detach().requires_grad_()
    out = reference.pixel_norm(x, eps, silu=len(grads) == 2)
    outputs = list(out) if isinstance(out, tuple) else [out]
    (grad_x,) = torch.autograd.grad(outputs, x, grads)
    return [y.detach() for y in outputs], grad_x


def check(library: Library, case: Case, dtype: torch.dtype) -> None:
    """Forward and backward, in both layouts, with and without MP-SiLU, under all schedules."""
    x = emulated.random_tensor(case.n, case.c, case.p, dtype=dtype)
    for layout, silu in itertools.product(case.layouts, (False, True)):
        channels_last = layout == "nhwc"
        grads = [emulated.random_tensor(*x.shape, dtype=dtype, seed=1 + i) for i in range(1 + silu)]
        what = f"{case} {dtype} {layout} silu={silu}"
        outputs = emulated.under_all_schedules(
            library, partial(forward, library, x, channels_last, silu, case.offset, case.eps)
        )
        (grad_x,) = emulated.under_all_schedules(
            library, partial(backward, library, grads, x, channels_last, case.offset, case.eps)
        )
        exact, exact_grad = plain(x.double(), [g.double() for g in grads], case.eps)
        rounded, rounded_grad = plain(x, grads, case.eps)
        for i, (out, low, high) in enumerate(zip(outputs, rounded, exact, strict=True)):
            emulated.assert_as_accurate(out, low, high, f"output {i}, {what}")
        emulated.assert_as_accurate(grad_x, rounded_grad, exact_grad, f"grad_x, {what}")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("pixel_norm")


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(library: Library, case: Case, dtype: torch.dtype):
    check(library, case, dtype)


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("number", range(4))
def test_one_misaligned_tensor(library: Library, number: int, dtype: torch.dtype):
    """Packs need every tensor aligned."""
    with emulated.misaligned(number):
        check(library, Case(2, 24, 16), dtype)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty(library: Library, shape: tuple[int, int, int], channels_last: bool):
    x = torch.empty(shape)
    before = library.launches()
    assert forward(library, x, channels_last, True)[0].shape == shape
    assert backward(library, [x, x], x, channels_last)[0].shape == shape
    assert library.launches() == before


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_zero_pixel_has_zero_subgradient(library: Library, channels_last: bool):
    x = torch.zeros(1, 24, 16)
    grad = emulated.random_tensor(1, 24, 16, dtype=torch.float32)
    assert forward(library, x, channels_last, False)[0].count_nonzero() == 0
    torch.testing.assert_close(backward(library, [grad], x, channels_last)[0], grad / EPS)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_nan_stays_in_its_pixel(library: Library, channels_last: bool):
    x = emulated.random_tensor(1, 24, 16, dtype=torch.float32)
    x[0, 5, 3] = math.nan
    bad = forward(library, x, channels_last, False)[0].isnan()
    assert bad[0, :, 3].all()
    assert bad.sum() == 24


def test_unknown_dtype_is_refused(library: Library):
    x = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(emulated.KernelFault, match="error 1"):
        library.call("pixel_norm", x, x, None, 1, 4, 1, False, torch.float64, EPS)
