"""q, k and v taken apart and normalised, and the backward: the CUDA kernels under emulation against plain torch."""

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
    """qkv is [n, 3 * heads * d, p]; every tensor starts `offset` elements past a 16-byte boundary."""

    n: int
    heads: int
    d: int
    p: int
    offset: int = 0
    layouts: tuple[str, ...] = ("nchw", "nhwc")


# One 16-byte pack holds 8 elements of 16 bits, or 4 of 32. Strips are of 32 pixels, or 16 where packs hold 4.
CASES = [
    Case(1, 1, 1, 1),
    Case(2, 3, 64, 16),  # EDM2's d
    Case(1, 2, 24, 40),  # lanes left over in a group; a strip that is not full
    Case(2, 2, 5, 7),  # single elements
    Case(2, 2, 8, 3),  # packs of channels, but none of pixels
    Case(1, 1, 136, 24),  # three chunks of channels; too long for registers (32 bits)
    Case(1, 2, 264, 3, layouts=("nhwc",)),  # too long for registers
    Case(1, 1, 67, 33),  # two chunks of channels, two strips, single elements
    Case(1, 1, 259, 3),  # a length that 8 bits of precision do not hold
    Case(1, 2, 16, 24, offset=1),  # no 16-byte access
    Case(2, 2, 8, 72),  # more strips than the grid has blocks
    Case(1, 2, 2, 150, layouts=("nhwc",)),  # more rows than it has warps
]


def part_memory(parts: Tensor) -> Tensor:
    """[N, heads, P, d] -> flat, in the order of the kernels."""
    return parts.transpose(1, 2).reshape(-1)


def forward(library: Library, qkv: Tensor, case: Case, channels_last: bool) -> list[Tensor]:
    """q, k and v, each [N, heads, P, d]."""
    source = Guarded(emulated.to_memory(qkv, channels_last), qkv.dtype, case.offset)
    parts = [Guarded(qkv.numel() // 3, qkv.dtype, case.offset) for _ in range(3)]
    sizes = (*qkv.shape, channels_last, case.heads, case.d)
    library.call("qkv_norm", source.tensor, *(part.tensor for part in parts), *sizes, qkv.dtype, EPS)
    for part in parts:
        part.check_margins()
    return [part.tensor.reshape(case.n, case.p, case.heads, case.d).transpose(1, 2) for part in parts]


def backward(library: Library, grads: list[Tensor], qkv: Tensor, case: Case, channels_last: bool) -> list[Tensor]:
    """The gradient of qkv."""
    inputs = [Guarded(part_memory(grad), qkv.dtype, case.offset) for grad in grads]
    inputs.append(Guarded(emulated.to_memory(qkv, channels_last), qkv.dtype, case.offset))
    grad_qkv = Guarded(qkv.numel(), qkv.dtype, case.offset)
    tensors = [t.tensor for t in (*inputs, grad_qkv)]
    sizes = (*qkv.shape, channels_last, case.heads, case.d)
    library.call("qkv_norm_backward", *tensors, *sizes, qkv.dtype, EPS)
    grad_qkv.check_margins()
    return [emulated.from_memory(grad_qkv.tensor, qkv.shape, channels_last)]


def plain(qkv: Tensor, grads: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Outputs and gradient in plain torch, in qkv's dtype.

    Channel (h * d + i) * 3 + j is channel i of head h of part j.
    """
    n, heads, p, d = grads[0].shape
    qkv = qkv.detach().requires_grad_()
    parts = qkv.reshape(n, heads, d, 3, p).unbind(3)
    outputs = [reference.pixel_norm(part.flatten(0, 1), EPS).unflatten(0, (n, heads)).transpose(2, 3) for part in parts]
    (grad,) = torch.autograd.grad(outputs, qkv, grads)
    return [out.detach() for out in outputs], grad


def check(library: Library, case: Case, dtype: torch.dtype) -> None:
    """Forward and backward, in both layouts, under all schedules."""
    qkv = emulated.random_tensor(case.n, 3 * case.heads * case.d, case.p, dtype=dtype)
    shape = (case.n, case.heads, case.p, case.d)
    grads = [emulated.random_tensor(*shape, dtype=dtype, seed=1 + j) for j in range(3)]
    exact, exact_grad = plain(qkv.double(), [grad.double() for grad in grads])
    rounded, rounded_grad = plain(qkv, grads)
    for layout in case.layouts:
        what = f"{case} {dtype} {layout}"
        channels_last = layout == "nhwc"
        outputs = emulated.under_all_schedules(library, partial(forward, library, qkv, case, channels_last))
        for name, out, low, high in zip("qkv", outputs, rounded, exact, strict=True):
            emulated.assert_as_accurate(out, low, high, f"{name}, {what}")
        run = partial(backward, library, grads, qkv, case, channels_last)
        (grad,) = emulated.under_all_schedules(library, run)
        emulated.assert_as_accurate(grad, rounded_grad, exact_grad, f"grad_qkv, {what}")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("cosine_attention")


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(library: Library, case: Case, dtype: torch.dtype):
    check(library, case, dtype)


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("number", range(5))
def test_one_misaligned_tensor(library: Library, number: int, dtype: torch.dtype):
    """Packs need every tensor aligned."""
    with emulated.misaligned(number):
        check(library, Case(1, 2, 24, 16), dtype)


def test_more_rows_than_the_grid_has_threads(library: Library):
    check(library, Case(1, 1, 4, 8200, layouts=("nhwc",)), torch.float32)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("n", "p"), [(0, 4), (2, 0)])
def test_empty(library: Library, n: int, p: int, channels_last: bool):
    case = Case(n, 2, 8, p)
    qkv = torch.empty(n, 48, p)
    before = library.launches()
    assert forward(library, qkv, case, channels_last)[0].shape == (n, 2, p, 8)
    assert backward(library, [torch.empty(n, 2, p, 8)] * 3, qkv, case, channels_last)[0].shape == qkv.shape
    assert library.launches() == before


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("d", [8, 3])
def test_zero_vector_has_zero_subgradient(library: Library, d: int, channels_last: bool):
    case = Case(1, 2, d, 8)
    qkv = torch.zeros(1, 6 * d, 8)
    grads = [emulated.random_tensor(1, 2, 8, d, dtype=torch.float32, seed=j) for j in range(3)]
    assert all(part.count_nonzero() == 0 for part in forward(library, qkv, case, channels_last))
    (grad,) = backward(library, grads, qkv, case, channels_last)
    torch.testing.assert_close(grad.reshape(1, 2, d, 3, 8), torch.stack(grads, 2).permute(0, 1, 4, 2, 3) / EPS)
