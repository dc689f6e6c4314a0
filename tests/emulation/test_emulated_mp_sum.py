"""MP-Sum, clipped or not, and its backward: the CUDA kernels under emulation against the reference in float64."""

import math
from functools import partial

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

T = 0.3
WEIGHTS = ((1 - T) / math.hypot(1 - T, T), T / math.hypot(1 - T, T))
Offsets = tuple[int, int]  # of the inputs, and of the gradient and the outputs


def forward(library: Library, a: Tensor, b: Tensor, clip: float, offsets: Offsets = (0, 0)) -> list[Tensor]:
    """mp_sum of a and b [numel]."""
    left, right = (Guarded(x, a.dtype, offsets[0]) for x in (a, b))
    y = Guarded(a.numel(), a.dtype, offsets[1])
    library.call("mp_sum", left.tensor, right.tensor, y.tensor, a.numel(), a.dtype, *WEIGHTS, clip)
    y.check_margins()
    return [y.tensor]


def backward(
    library: Library, grad: Tensor, a: "Tensor | None", b: "Tensor | None", clip: float, offsets: Offsets = (0, 0)
) -> list[Tensor]:
    """The gradients of a and b [numel], which are None where they must not be read."""
    inputs = [None if x is None else Guarded(x, x.dtype, offsets[0]) for x in (a, b)]
    grad_y = Guarded(grad, grad.dtype, offsets[1])
    outputs = [Guarded(grad.numel(), grad.dtype, offsets[1]) for _ in range(2)]
    tensors = [None if t is None else t.tensor for t in (grad_y, *inputs, *outputs)]
    library.call("mp_sum_backward", *tensors, grad.numel(), grad.dtype, *WEIGHTS, clip)
    for out in outputs:
        out.check_margins()
    return [out.tensor for out in outputs]


def plain(a: Tensor, b: Tensor, grad: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients in plain torch, in a's dtype."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    y = reference.mp_sum(a, b, T, None if clip == math.inf else clip)
    return y.detach(), *torch.autograd.grad(y, (a, b), grad)


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("mp_sum")


@pytest.mark.parametrize("offsets", [(0, 0), (3, 3), (0, 1)], ids=["aligned", "misaligned", "unequally aligned"])
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 255, 4099, 70001])
@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_matches_reference(library: Library, clip: float, numel: int, dtype: torch.dtype, offsets: Offsets):
    check(library, clip, numel, dtype, offsets)


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_one_misaligned_tensor(library: Library, clip: float, number: int, dtype: torch.dtype):
    with emulated.misaligned(number):
        check(library, clip, 100, dtype, (0, 0))


def check(library: Library, clip: float, numel: int, dtype: torch.dtype, offsets: Offsets) -> None:
    """Forward and backward under all schedules; inputs are given to the backward only where it may read them."""
    a, b, grad = (emulated.random_tensor(numel, dtype=dtype, seed=i) for i in range(3))
    near = (reference.mp_sum(a.double(), b.double(), T).abs() - clip).abs() < 0.02  # where rounding would decide
    a, b = a.masked_fill(near, 0), b.masked_fill(near, 0)
    exact, rounded = plain(a.double(), b.double(), grad.double(), clip), plain(a, b, grad, clip)
    outputs = emulated.under_all_schedules(library, partial(forward, library, a, b, clip, offsets))
    inputs = (None, None) if clip == math.inf else (a, b)
    outputs += emulated.under_all_schedules(library, partial(backward, library, grad, *inputs, clip, offsets))
    for name, out, low, high in zip(("y", "grad_a", "grad_b"), outputs, rounded, exact, strict=True):
        emulated.assert_as_accurate(out, low, high, f"{name}, {numel} {dtype} {offsets} {clip}")


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
def test_bounds(library: Library, dtype: torch.dtype):
    """The bounds themselves pass the gradient; NaN remains in the sum and stops the gradient."""
    library.schedule(*emulated.SCHEDULES[0])
    values = torch.tensor([1.0, -1.0, 1.25, -1.25, 0.5, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    clip = 1.0 * WEIGHTS[0]
    a, b = values.to(dtype), torch.zeros(8, dtype=dtype)
    expected = torch.tensor([1, -1, 1, -1, 0.5, 1, -1, torch.nan], dtype=torch.float64) * WEIGHTS[0]
    (y,) = forward(library, a, b, clip)
    torch.testing.assert_close(y, expected.to(dtype), equal_nan=True)
    grad_a, grad_b = backward(library, torch.ones_like(a), a, b, clip)
    passes = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(grad_a, (passes * WEIGHTS[0]).to(dtype))
    torch.testing.assert_close(grad_b, (passes * WEIGHTS[1]).to(dtype))


def test_stopped_gradient_is_zero_whatever_it_was(library: Library):
    a = torch.full((9,), 3.0)
    grad = torch.full((9,), torch.inf)
    assert all(not g.any() for g in backward(library, grad, a, a, 1.0))


def test_empty(library: Library):
    before = library.launches()
    empty = torch.empty(0)
    forward(library, empty, empty, math.inf)
    backward(library, empty, empty, empty, 1.0)
    assert library.launches() == before
