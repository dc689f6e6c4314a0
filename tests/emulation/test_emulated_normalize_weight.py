"""Weight normalisation and its backward: the CUDA kernels under emulation against the reference in float64."""

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

EPS = 1e-4
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPE_PAIRS = [(F32, F32), (F32, F16), (F32, BF16), (F16, F16), (BF16, BF16), (BF16, F32), (F16, BF16)]


class Case(NamedTuple):
    """A weight [rows, size / inner, inner] at `offset` elements past a 16-byte boundary; 0: no gain."""

    rows: int
    size: int
    inner: int = 1
    gain: float = 0.7
    offset: int = 0


# Rows up to 512 elements take a warp, longer ones a block; the emulated GPU's shared memory holds 25,088 floats.
CASES = [
    Case(5, 1),
    Case(9, 45, 9),
    Case(11, 128, gain=0),
    Case(3, 72, 9),
    Case(20, 512),
    Case(2, 513),
    Case(3, 1728, 9),
    Case(2, 1024, offset=1),
    Case(2, 4212, 9, gain=-1.3),
    Case(1, 6912),
    Case(4, 30, 3, offset=3),
    Case(3, 24, 4),  # quads in one layout, none in the other
    Case(1, 25092, 9),  # too long for shared memory
    Case(1, 32256),  # the longest of EDM2-XXL
    Case(0, 16),
    Case(66, 1152, 9),  # more rows than blocks
]


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def integers(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def doubles(values: Sequence[float]) -> ctypes.Array:
    return (ctypes.c_double * len(values))(*values)


def gains_of(cases: Sequence[Case]) -> list[Tensor | None]:
    return [torch.tensor(case.gain) if case.gain else None for case in cases]


def weights_of(cases: Sequence[Case], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    return [
        emulated.random_tensor(case.rows, case.size // case.inner, case.inner, dtype=dtype, seed=seed + i)
        for i, case in enumerate(cases)
    ]


def run(
    library: Library, cases: Sequence[Case], weights: list[Tensor], out_dtype: torch.dtype, force: bool, want_out: bool
) -> list[Tensor]:
    """The weights afterwards, then, if wanted, the effective weights, in the weights' order of elements."""
    dtype = weights[0].dtype
    sources = [Guarded(w, dtype, case.offset) for w, case in zip(weights, cases, strict=True)]
    outs = [Guarded(w.numel(), out_dtype, case.offset) for w, case in zip(weights, cases, strict=True)]
    gains = gains_of(cases)
    library.call(
        "normalize_weight",
        pointers([s.tensor for s in sources]),
        pointers([o.tensor if want_out else None for o in outs]),
        pointers(gains),
        integers([case.rows for case in cases]),
        integers([case.size for case in cases]),
        integers([case.inner for case in cases]),
        doubles([case.size**-0.5 for case in cases]),
        len(cases),
        dtype,
        out_dtype,
        EPS,
        force,
    )
    for guarded in (*sources, *outs):
        guarded.check_margins()
    results = [s.tensor.reshape(w.shape) for s, w in zip(sources, weights, strict=True)]
    if want_out:
        for out, w in zip(outs, weights, strict=True):
            rows, outer, inner = w.shape
            results.append(out.tensor.reshape(rows, inner, outer).transpose(1, 2))
    return results


def plain(w: Tensor, gain: Tensor | None, out_dtype: torch.dtype, force: bool) -> tuple[Tensor, Tensor]:
    """Weight and effective weight in plain torch."""
    if force:
        w = reference.normalize_weight(w)
    return w, reference.effective_weight(w, 1 if gain is None else gain.to(w.dtype), out_dtype)


def check(
    library: Library, cases: Sequence[Case], dtype: torch.dtype, out_dtype: torch.dtype, force: bool, want_out: bool
) -> None:
    """A list of weights in one call, under all schedules."""
    weights = weights_of(cases, dtype)
    arguments = (library, cases, weights, out_dtype, force, want_out)
    results = emulated.under_all_schedules(library, partial(run, *arguments))
    for i, (case, w, gain) in enumerate(zip(cases, weights, gains_of(cases), strict=True)):
        what = f"{case} {dtype} {out_dtype} {force=}"
        rounded = plain(w, gain, out_dtype, force)
        exact = plain(w.double(), gain, torch.float64, force)
        if force:
            emulated.assert_as_accurate(results[i], rounded[0], exact[0], f"forced, {what}")
        else:
            assert torch.equal(results[i], w), "a weight was written"
        if want_out:
            emulated.assert_as_accurate(results[len(cases) + i], rounded[1], exact[1], f"effective, {what}")


def run_backward(library: Library, cases: Sequence[Case], weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Gradients of the weights, then those of the gains."""
    dtype, grad_dtype = weights[0].dtype, grads[0].dtype
    sources = [Guarded(w, dtype, case.offset) for w, case in zip(weights, cases, strict=True)]
    incoming = [Guarded(g, grad_dtype, case.offset) for g, case in zip(grads, cases, strict=True)]
    grad_ws = [Guarded(w.numel(), dtype, case.offset) for w, case in zip(weights, cases, strict=True)]
    dots = [Guarded(case.rows, F32) if case.gain else None for case in cases]
    grad_gains = [Guarded(1, F32) if case.gain else None for case in cases]
    gains = gains_of(cases)
    factors = [case.size**-0.5 for case in cases]
    library.call(
        "normalize_weight_backward",
        pointers([g.tensor for g in incoming]),
        pointers([s.tensor for s in sources]),
        pointers([g.tensor for g in grad_ws]),
        pointers([d and d.tensor for d in dots]),
        pointers([g and g.tensor for g in grad_gains]),
        pointers(gains),
        integers([case.rows for case in cases]),
        integers([case.size for case in cases]),
        doubles(factors),
        doubles(factors),
        len(cases),
        dtype,
        grad_dtype,
        EPS,
    )
    for guarded in (*sources, *incoming, *grad_ws, *filter(None, dots), *filter(None, grad_gains)):
        guarded.check_margins()
    return [g.tensor.reshape(w.shape) for g, w in zip(grad_ws, weights, strict=True)] + [
        g.tensor for g in grad_gains if g is not None
    ]


def plain_backward(w: Tensor, gain: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Gradients of weight and gain in plain torch."""
    leaves = [w.detach().requires_grad_()]
    if gain is not None:
        leaves.append(gain.detach().to(torch.promote_types(w.dtype, F32)).requires_grad_())
    out = reference.effective_weight(leaves[0], leaves[1] if gain is not None else 1, grad.dtype)
    return list(torch.autograd.grad(out, leaves, grad))


def check_backward(library: Library, cases: Sequence[Case], dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """A list of weights in one call, under all schedules."""
    weights, grads = weights_of(cases, dtype), weights_of(cases, grad_dtype, seed=100)
    results = emulated.under_all_schedules(library, partial(run_backward, library, cases, weights, grads))
    gains: list[tuple[Tensor, Tensor]] = []
    for i, (case, gain) in enumerate(zip(cases, gains_of(cases), strict=True)):
        what = f"{case} {dtype} {grad_dtype}"
        rounded = plain_backward(weights[i], gain, grads[i])
        exact = plain_backward(weights[i].double(), gain, grads[i].double())
        emulated.assert_as_accurate(results[i], rounded[0], exact[0], f"grad_w, {what}")
        if gain is not None:
            gains.append((rounded[1], exact[1]))
    # One vector: these are sums that cancel, and a single one's error in plain torch may happen to be 0.
    rounded, exact = (torch.stack(each) for each in zip(*gains, strict=True))
    emulated.assert_as_accurate(torch.cat(results[len(cases) :]), rounded, exact, f"grad_gain, {dtype} {grad_dtype}")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("normalize_weight")


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
def test_effective_weights(library: Library, dtypes: tuple[torch.dtype, torch.dtype]):
    check(library, CASES, *dtypes, force=False, want_out=True)


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
def test_forced_normalisation(library: Library, dtype: torch.dtype):
    check(library, CASES, dtype, dtype, force=True, want_out=False)


@pytest.mark.parametrize("out_dtype", emulated.DTYPES, ids=str)
def test_forced_normalisation_and_effective_weights_in_one_pass(library: Library, out_dtype: torch.dtype):
    check(library, CASES, F32, out_dtype, force=True, want_out=True)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
def test_backward(library: Library, dtypes: tuple[torch.dtype, torch.dtype]):
    check_backward(library, CASES, *dtypes)


@pytest.mark.parametrize("number", range(3))
def test_one_misaligned_tensor(library: Library, number: int):
    """Quads need every tensor aligned."""
    with emulated.misaligned(number):
        check(library, [Case(9, 128)], F32, F16, force=True, want_out=True)
        check_backward(library, [Case(9, 128)], F32, F16)


@pytest.mark.parametrize(
    ("count", "launches", "backward_launches"),
    [(1, 1, 2), (2, 1, 2), (3, 1, 2), (450, 1, 2), (451, 1, 4), (580, 1, 4), (581, 2, 4)],
)
def test_table_limits(library: Library, count: int, launches: int, backward_launches: int):
    cases = [Case(1 + i % 2, 1 + i % 5) for i in range(count)]
    library.schedule("forward", "forward", 0)
    before = library.launches()
    weights = weights_of(cases, F32)
    results = run(library, cases, weights, F32, force=False, want_out=True)[count:]
    assert library.launches() - before == launches
    gains = run_backward(library, cases, weights, weights)[count:]
    assert library.launches() - before == launches + backward_launches

    def plainly(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All effective weights and all gradients of gains in plain torch."""
        given = [(w.to(dtype), gain) for w, gain in zip(weights, gains_of(cases), strict=True)]
        outs = [plain(w, gain, dtype, False)[1].flatten() for w, gain in given]
        return torch.cat(outs), torch.stack([plain_backward(w, gain, w)[1] for w, gain in given])

    for found, rounded, exact in zip((results, gains), plainly(F32), plainly(torch.float64), strict=True):
        emulated.assert_as_accurate(torch.cat([t.flatten() for t in found]), rounded, exact, f"{count} weights")


@pytest.mark.parametrize(("size", "floats"), [(3, 4096), (512, 4096), (4100, 4100), (12288, 12288), (30000, 25088)])
def test_rows_are_held_in_shared_memory(library: Library, size: int, floats: int):
    """A warp's row of up to 512 elements for each warp, one longer row, also one of the 48 KB that a block has unasked,
    or as much of it as there is memory."""
    case, w = Case(1, size, gain=0), weights_of([Case(1, size)], F32)
    run(library, [case], w, F32, force=True, want_out=True)
    assert library.dynamic_shared() == 4 * floats
    run_backward(library, [case], w, w)
    assert library.dynamic_shared() == min(8 * floats, 4 * 25088)


@pytest.mark.parametrize("sizes", [[(1 << 31, 4)], [(1, 1 << 31)], [((1 << 30) + 1, 600)] * 2], ids=str)
def test_what_a_table_cannot_number_is_refused(library: Library, sizes: list[tuple[int, int]]):
    nulls, ones = pointers([None] * len(sizes)), doubles([1.0] * len(sizes))
    rows, row_sizes = (integers(each) for each in zip(*sizes, strict=True))
    before = library.launches()
    last = (len(sizes), F32, F32, EPS)
    with pytest.raises(emulated.KernelFault, match="error 1"):
        library.call("normalize_weight", *[nulls] * 3, rows, row_sizes, integers([1, 1]), ones, *last, True)
    with pytest.raises(emulated.KernelFault, match="error 1"):
        library.call("normalize_weight_backward", *[nulls] * 6, rows, row_sizes, ones, ones, *last)
    assert library.launches() == before


def test_zero_rows(library: Library):
    """At rms 0 the gradient is grad / eps (spec 2.1)."""
    case, zeros = Case(2, 8, gain=0), torch.zeros(2, 8, 1)
    grad = emulated.random_tensor(2, 8, 1, dtype=F32)
    (out,) = run(library, [case], [zeros], F32, force=False, want_out=True)[1:]
    assert torch.equal(out, zeros)
    (grad_w,) = run_backward(library, [case], [zeros], [grad])
    torch.testing.assert_close(grad_w, grad / EPS / math.sqrt(8))


def test_nothing_to_do(library: Library):
    before = library.launches()
    assert run(library, [Case(0, 4)], [torch.empty(0, 4, 1)], F32, force=False, want_out=True)[1].numel() == 0
    assert library.launches() == before
    (grad_w, grad_gain) = run_backward(library, [Case(0, 4)], [torch.empty(0, 4, 1)], [torch.empty(0, 4, 1)])
    assert grad_w.numel() == 0
    assert grad_gain.item() == 0


def test_no_double(library: Library):
    with pytest.raises(emulated.KernelFault, match="error 1"):
        library.call(
            "normalize_weight",
            *[pointers([None])] * 3,
            *[integers([0])] * 3,
            doubles([1.0]),
            0,
            torch.float64,
            torch.float32,
            EPS,
            True,
        )
