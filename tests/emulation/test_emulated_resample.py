"""2x resampling and its backwards: the CUDA kernels under emulation against the reference in float64."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

BOX, FOUR, UNEVEN = (1.0, 1.0), (1.0, 3.0, 3.0, 1.0), (0.5, 1.0, -2.0, 1.0, 3.0, 0.25)


class Case(NamedTuple):
    """x is [n, c, height, width]; every tensor starts `offset` elements past a 16-byte boundary."""

    n: int
    c: int
    height: int
    width: int
    offset: int = 0
    filters: tuple[tuple[float, ...], ...] = (BOX, FOUR)
    layouts: tuple[str, ...] = ("nchw", "nhwc")


# One 16-byte pack holds 8 elements of 16 bits, or 4 of 32.
CASES = [
    Case(1, 1, 2, 2, filters=(BOX,)),
    Case(2, 3, 5, 7, filters=(BOX, FOUR, UNEVEN, (1.0, 2.0))),  # the last row and column have no partner
    Case(2, 24, 5, 6),  # packs of channels
    Case(1, 40, 6, 5, filters=(BOX, FOUR, UNEVEN)),
    Case(2, 3, 7, 32, layouts=("nchw",)),  # pairs of neighbours in packs of pixels, an odd row
    Case(1, 2, 4, 48, filters=(BOX,), layouts=("nchw",)),
    Case(1, 2, 3, 33, filters=(BOX,), layouts=("nchw",)),  # packs but for the last column
    Case(2, 8, 4, 16, offset=1),  # no 16-byte access
    Case(1, 5, 4, 16, offset=5, filters=(BOX,)),
    Case(1, 16, 40, 44, filters=(BOX,)),  # more work than the grid has blocks
    Case(3, 5, 44, 46, filters=(FOUR,), layouts=("nchw",)),
    Case(1, 2, 2, 3, filters=(tuple(1.0 + k for k in range(128)),)),
]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def flat(x: Tensor, layout: str) -> Tensor:
    """[N, C, H, W] -> flat, in the order the kernels see."""
    return (x.permute(0, 2, 3, 1) if layout == "nhwc" else x).reshape(-1)


def image(values: Tensor, shape: tuple[int, ...], layout: str) -> Tensor:
    """The inverse of flat."""
    n, c, h, w = shape
    return values.reshape(n, h, w, c).permute(0, 3, 1, 2) if layout == "nhwc" else values.reshape(shape)


def resample(
    library: Library, x: Tensor, size: tuple[int, int], taps: list[float], up: bool, layout: str, offset: int
) -> list[Tensor]:
    """x resampled to height and width `size`."""
    shape = (*x.shape[:2], *size)
    source, y = (
        Guarded(flat(x, layout), x.dtype, offset),
        Guarded(shape[0] * shape[1] * size[0] * size[1], x.dtype, offset),
    )
    filter = torch.tensor(taps, dtype=torch.float64)
    sizes = (*x.shape, *size)
    library.call("resample", source.tensor, y.tensor, *sizes, layout == "nhwc", x.dtype, filter, len(taps), up)
    y.check_margins()
    return [image(y.tensor, shape, layout)]


def plain(function: Callable[..., Tensor], x: Tensor, grad: Tensor, filter: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Output and gradient in plain torch, in x's dtype."""
    x = x.detach().requires_grad_()
    y = function(x, filter)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def check(library: Library, case: Case, dtype: torch.dtype) -> None:
    """Both directions, forward and backward, in both layouts under all schedules."""
    x = emulated.random_tensor(*case[:4], dtype=dtype)
    for filter, (up, function) in itertools.product(
        case.filters, enumerate((reference.resample_down, reference.resample_up))
    ):
        taps = [(2 if up else 1) * tap / sum(filter) for tap in filter]
        grad = torch.empty_like(function(x, filter))
        grad = emulated.random_tensor(*grad.shape, dtype=dtype, seed=1)
        exact, exact_grad = plain(function, x.double(), grad.double(), filter)
        rounded, rounded_grad = plain(function, x, grad, filter)
        for layout in case.layouts:
            what = f"{case} {dtype} {layout} up={bool(up)} {len(filter)} taps"
            run = partial(resample, library, taps=taps, layout=layout, offset=case.offset)
            (y,) = emulated.under_all_schedules(library, partial(run, x=x, size=grad.shape[2:], up=bool(up)))
            emulated.assert_as_accurate(y, rounded, exact, f"y, {what}")
            (grad_x,) = emulated.under_all_schedules(library, partial(run, x=grad, size=x.shape[2:], up=not up))
            emulated.assert_as_accurate(grad_x, rounded_grad, exact_grad, f"grad_x, {what}")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("resample")


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(library: Library, case: Case, dtype: torch.dtype):
    check(library, case, dtype)


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("number", range(2))
def test_one_misaligned_tensor(library: Library, number: int, dtype: torch.dtype):
    """Packs need every tensor aligned."""
    with emulated.misaligned(number):
        check(library, Case(2, 8, 4, 16), dtype)


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 0, 4, 4), (1, 3, 0, 4)], ids=str)
def test_empty(library: Library, shape: tuple[int, ...]):
    x = torch.empty(shape)
    before = library.launches()
    for taps in ([1.0, 1.0], [0.25, 0.75, 0.75, 0.25]):
        resample(library, x, (2 * shape[2], 2 * shape[3]), taps, True, "nchw", 0)
    assert library.launches() == before


def test_too_long_a_filter_is_refused(library: Library):
    with pytest.raises(emulated.KernelFault, match="error 1"):
        resample(library, torch.ones(1, 1, 4, 4), (8, 8), [1.0] * 130, True, "nchw", 0)
