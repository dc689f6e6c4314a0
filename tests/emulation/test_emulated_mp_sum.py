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
UNTOUCHED = 0xA5
Offsets = tuple[int, int]  # of the inputs, and of the gradients and the outputs


def forward(library: Library, a: Tensor, b: Tensor, clip: float, offsets: Offsets = (0, 0)) -> list[Tensor]:
    """mp_sum of a and b [numel], with the mask of a byte for eight elements where the clip is finite."""
    left, right = (Guarded(x, a.dtype, offsets[0]) for x in (a, b))
    y = Guarded(a.numel(), a.dtype, offsets[1])
    mask = torch.full([(a.numel() + 7) // 8 + 1], UNTOUCHED, dtype=torch.uint8)
    bits = mask if clip < math.inf else None
    library.call("mp_sum", left.tensor, right.tensor, y.tensor, bits, a.numel(), a.dtype, *WEIGHTS, clip)
    y.check_margins()
    assert mask[-1] == UNTOUCHED
    return [y.tensor] if bits is None else [y.tensor, mask[:-1]]


def backward(
    library: Library, grads: tuple[Tensor, ...], mask: "Tensor | None", offsets: Offsets = (0, 0)
) -> list[Tensor]:
    """The gradients of both inputs [numel], from those of one or two users."""
    given = [Guarded(grad, grad.dtype, offsets[i]) for i, grad in enumerate(grads)]
    numel, dtype = grads[0].numel(), grads[0].dtype
    outputs = [Guarded(numel, dtype, offsets[1]) for _ in range(2)]
    more = given[1].tensor if len(given) > 1 else None
    results = [out.tensor for out in outputs]
    library.call("mp_sum_backward", given[0].tensor, more, mask, *results, numel, dtype, *WEIGHTS)
    for out in outputs:
        out.check_margins()
    return results


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
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("clip", [math.inf, 1.0])
def test_one_misaligned_tensor(library: Library, clip: float, number: int, dtype: torch.dtype):
    with emulated.misaligned(number):
        check(library, clip, 100, dtype, (0, 0))


def check(library: Library, clip: float, numel: int, dtype: torch.dtype, offsets: Offsets) -> None:
    """Forward, and backward for one user and for two, under all schedules."""
    a, b, grad, more = (emulated.random_tensor(numel, dtype=dtype, seed=i) for i in range(4))
    near = (reference.mp_sum(a.double(), b.double(), T).abs() - clip).abs() < 0.02  # where rounding would decide
    a, b = a.masked_fill(near, 0), b.masked_fill(near, 0)
    y, *masks = emulated.under_all_schedules(library, partial(forward, library, a, b, clip, offsets))
    mask = masks[0] if masks else None
    for grads in ((grad,), (grad, more)):
        exact = plain(a.double(), b.double(), sum(g.double() for g in grads), clip)
        rounded = plain(a, b, sum(grads[1:], grads[0]), clip)
        found = emulated.under_all_schedules(library, partial(backward, library, grads, mask, offsets))
        for name, out, low, high in zip(("y", "grad_a", "grad_b"), (y, *found), rounded, exact, strict=True):
            emulated.assert_as_accurate(out, low, high, f"{name}, {numel} {dtype} {offsets} {clip} {len(grads)} users")


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
def test_bounds(library: Library, dtype: torch.dtype):
    """The bounds themselves pass the gradient; NaN remains in the sum and stops the gradient."""
    library.schedule(*emulated.SCHEDULES[0])
    values = torch.tensor([1.0, -1.0, 1.25, -1.25, 0.5, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    clip = 1.0 * WEIGHTS[0]
    a, b = values.to(dtype), torch.zeros(8, dtype=dtype)
    expected = torch.tensor([1, -1, 1, -1, 0.5, 1, -1, torch.nan], dtype=torch.float64) * WEIGHTS[0]
    y, mask = forward(library, a, b, clip)
    torch.testing.assert_close(y, expected.to(dtype), equal_nan=True)
    assert mask.tolist() == [0b00010011]
    grad_a, grad_b = backward(library, (torch.ones_like(a),), mask)
    passes = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(grad_a, (passes * WEIGHTS[0]).to(dtype))
    torch.testing.assert_close(grad_b, (passes * WEIGHTS[1]).to(dtype))


@pytest.mark.parametrize("numel", [3, 8, 21])
def test_bits_behind_the_last_element_are_zero(library: Library, numel: int):
    _, mask = forward(library, torch.zeros(numel), torch.zeros(numel), 1.0)
    assert mask.tolist() == [255] * (numel // 8) + ([2 ** (numel % 8) - 1] if numel % 8 else [])


def test_stopped_gradient_is_zero_whatever_it_was(library: Library):
    grad = torch.full((9,), torch.inf)
    mask = torch.zeros(2, dtype=torch.uint8)
    assert all(not g.any() for grads in ((grad,), (grad, -grad)) for g in backward(library, grads, mask))


def test_empty(library: Library):
    before = library.launches()
    empty, mask = torch.empty(0), torch.empty(0, dtype=torch.uint8)
    for clip in (math.inf, 1.0):
        forward(library, empty, empty, clip)
    for bits in (None, mask):
        backward(library, (empty,), bits)
        backward(library, (empty, empty), bits)
    assert library.launches() == before
