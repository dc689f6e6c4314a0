"""MP-Cat with and without MP-SiLU, and the backwards: the CUDA kernels under emulation against the reference."""

from functools import partial
from typing import NamedTuple

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

T = 0.4


class Case(NamedTuple):
    """a is [n, a, p], b [n, b, p]; every tensor starts `offset` elements past a 16-byte boundary."""

    n: int
    a: int
    b: int
    p: int
    offset: int = 0


# One 16-byte pack holds 8 elements of 16 bits, or 4 of 32; a block has 256 threads, a grid at most 32 or 64 blocks.
CASES = [
    Case(1, 1, 1, 1),
    Case(2, 3, 5, 7),
    Case(2, 8, 16, 9),  # packs in both layouts
    Case(3, 24, 8, 16),
    Case(2, 4, 12, 6),  # packs of 32 bits, not of 16
    Case(1, 1, 255, 8),
    Case(2, 77, 3, 5),
    Case(3, 8, 3, 7),  # only one of the two made of packs
    Case(3, 3, 8, 7),
    Case(1, 160, 96, 600),  # every thread takes several units, rows apart (nhwc)
    Case(40, 33, 16, 31),
    Case(2, 16, 24, 8, offset=1),
    Case(3, 8, 8, 5, offset=8),  # aligned again
    Case(2, 3, 5, 0),
]


def cat(library: Library, a: Tensor, b: Tensor, channels_last: bool, silu: bool, offset: int = 0) -> list[Tensor]:
    """Outputs for a [N, A, P] and b [N, B, P]."""
    dtype = a.dtype
    parts = [Guarded(emulated.to_memory(x, channels_last), dtype, offset) for x in (a, b)]
    outputs = [Guarded(a.numel() + b.numel(), dtype, offset) for _ in range(2 if silu else 1)]
    pointers = [t.tensor for t in (*parts, *outputs)] + [None] * (not silu)
    library.call("mp_cat", *pointers, *rows(a, b, channels_last), dtype, *weights(a, b))
    for out in outputs:
        out.check_margins()
    shape = (a.shape[0], a.shape[1] + b.shape[1], a.shape[2])
    return [emulated.from_memory(out.tensor, shape, channels_last) for out in outputs]


def rows(a: Tensor, b: Tensor, channels_last: bool) -> tuple[int, int, int]:
    """Number of rows, and sizes of the parts in each."""
    n, _, p = a.shape
    return (n * p, a.shape[1], b.shape[1]) if channels_last else (n, a.shape[1] * p, b.shape[1] * p)


def weights(a: Tensor, b: Tensor) -> tuple[float, float]:
    return reference.cat_scales(a.shape[1], b.shape[1], T)


def cat_backward(
    library: Library, grads: list[Tensor], out: Tensor, a: Tensor, b: Tensor, channels_last: bool, offset: int = 0
) -> list[Tensor]:
    """Gradients of a and b; `grads` for out and, unless it is missing, for MP-SiLU of it."""
    dtype = a.dtype
    inputs = [Guarded(emulated.to_memory(x, channels_last), dtype, offset) for x in (*grads, out)]
    outputs = [Guarded(x.numel(), dtype, offset) for x in (a, b)]
    given = [t.tensor for t in inputs] if len(grads) == 2 else [inputs[0].tensor, None, None]
    pointers = given + [t.tensor for t in outputs]
    library.call("mp_cat_backward", *pointers, *rows(a, b, channels_last), dtype, *weights(a, b), None, None)
    for result in outputs:
        result.check_margins()
    return [emulated.from_memory(t.tensor, x.shape, channels_last) for t, x in zip(outputs, (a, b), strict=True)]


def silu_only(library: Library, a: Tensor, b: Tensor, channels_last: bool, offset: int = 0) -> list[Tensor]:
    """MP-SiLU of the concatenation, which is stored nowhere."""
    dtype = a.dtype
    parts = [Guarded(emulated.to_memory(x, channels_last), dtype, offset) for x in (a, b)]
    out = Guarded(a.numel() + b.numel(), dtype, offset)
    pointers = [parts[0].tensor, parts[1].tensor, None, out.tensor]
    library.call("mp_cat", *pointers, *rows(a, b, channels_last), dtype, *weights(a, b))
    out.check_margins()
    shape = (a.shape[0], a.shape[1] + b.shape[1], a.shape[2])
    return [emulated.from_memory(out.tensor, shape, channels_last)]


def silu_only_backward(
    library: Library, grads: list[Tensor], a: Tensor, b: Tensor, channels_last: bool, offset: int = 0
) -> list[Tensor]:
    """Gradients of a and b, from a and b."""
    dtype = a.dtype
    inputs = [Guarded(emulated.to_memory(x, channels_last), dtype, offset) for x in (*grads, a, b)]
    outputs = [Guarded(x.numel(), dtype, offset) for x in (a, b)]
    grad, grad_silu, *parts = (t.tensor for t in inputs)
    pointers = [grad, grad_silu, None, outputs[0].tensor, outputs[1].tensor]
    library.call("mp_cat_backward", *pointers, *rows(a, b, channels_last), dtype, *weights(a, b), *parts)
    for result in outputs:
        result.check_margins()
    return [emulated.from_memory(t.tensor, x.shape, channels_last) for t, x in zip(outputs, (a, b), strict=True)]


def plain(a: Tensor, b: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients in plain torch, in a's dtype."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    outputs = reference.mp_cat(a, b, T, silu=len(grads) == 2)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, (a, b), grads))


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("mp_cat")


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(library: Library, case: Case, dtype: torch.dtype, channels_last: bool, silu: bool):
    check(library, case, dtype, channels_last, silu)


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("number", range(5))
def test_one_misaligned_tensor(library: Library, number: int, dtype: torch.dtype, silu: bool):
    """Packs need every tensor aligned."""
    with emulated.misaligned(number):
        check(library, Case(2, 16, 24, 8), dtype, True, silu)


def check(library: Library, case: Case, dtype: torch.dtype, channels_last: bool, silu: bool) -> None:
    """Forward and backward under all schedules."""
    a = emulated.random_tensor(case.n, case.a, case.p, dtype=dtype)
    b = emulated.random_tensor(case.n, case.b, case.p, dtype=dtype, seed=1)
    total = (case.n, case.a + case.b, case.p)
    grads = [emulated.random_tensor(*total, dtype=dtype, seed=2 + i) for i in range(2 if silu else 1)]
    exact = plain(a.double(), b.double(), [g.double() for g in grads])
    rounded = plain(a, b, grads)
    outputs = emulated.under_all_schedules(library, partial(cat, library, a, b, channels_last, silu, case.offset))
    arguments = (grads, outputs[0], a, b, channels_last, case.offset)
    outputs += emulated.under_all_schedules(library, partial(cat_backward, library, *arguments))
    for i, (out, low, high) in enumerate(zip(outputs, rounded, exact, strict=True)):
        emulated.assert_as_accurate(out, low, high, f"output {i}, {case} {dtype} {channels_last} {silu}")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_storing_the_concatenation(library: Library, case: Case, dtype: torch.dtype, channels_last: bool):
    """The same bits as with it."""
    check_silu_only(library, case, dtype, channels_last)


@pytest.mark.parametrize("number", range(6))
def test_one_misaligned_tensor_without_the_concatenation(library: Library, number: int):
    with emulated.misaligned(number):
        check_silu_only(library, Case(2, 16, 24, 8), torch.float16, True)


def check_silu_only(library: Library, case: Case, dtype: torch.dtype, channels_last: bool) -> None:
    a = emulated.random_tensor(case.n, case.a, case.p, dtype=dtype)
    b = emulated.random_tensor(case.n, case.b, case.p, dtype=dtype, seed=1)
    total = (case.n, case.a + case.b, case.p)
    grads = [emulated.random_tensor(*total, dtype=dtype, seed=2 + i) for i in range(2)]
    place = (channels_last, case.offset)
    run = partial(silu_only, library, a, b, *place)
    (out_silu,) = emulated.under_all_schedules(library, run)
    got = emulated.under_all_schedules(library, partial(silu_only_backward, library, grads, a, b, *place))
    out, stored = cat(library, a, b, channels_last, True, case.offset)
    assert torch.equal(out_silu, stored)
    expected = cat_backward(library, grads, out, a, b, *place)
    for grad, same in zip(got, expected, strict=True):
        assert torch.equal(grad, same)


def test_silu_is_of_the_stored_product(library: Library):
    library.schedule(*emulated.SCHEDULES[0])
    a = emulated.random_tensor(2, 8, 100, dtype=torch.bfloat16)
    out, out_silu = cat(library, a, a, True, True)
    emulated.assert_as_accurate(out_silu, reference.mp_silu(out), reference.mp_silu(out.double()), "silu")


def test_one_launch(library: Library):
    a = torch.ones(2, 8, 3)
    for silu in (False, True):
        before = library.launches()
        outputs = cat(library, a, a, True, silu)
        cat_backward(library, outputs, outputs[0], a, a, True)
        assert library.launches() == before + 2
