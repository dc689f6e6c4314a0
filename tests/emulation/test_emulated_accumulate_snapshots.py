"""Weighted sums of snapshots: the CUDA kernel under emulation against the formula in float64."""

import ctypes
from collections.abc import Sequence
from functools import partial

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

MOST_INPUTS = 80  # that one launch takes
MOST_COEFS = 7168


def accumulate(
    library: Library,
    inputs: Sequence[Tensor],
    coefs: Tensor,
    start: Tensor,
    compensated: bool = False,
    offsets: tuple[int, int] = (0, 0),
    stride: int = 0,
) -> list[Tensor]:
    """start [M, numel] + sums; offsets of inputs and of the output, whose rows are `stride` apart, or dense."""
    sources = [Guarded(x, x.dtype, offsets[0]) for x in inputs]
    count, numel = start.shape
    stride = stride or numel
    spread = torch.full((count, stride), torch.nan)
    spread[:, :numel] = start
    out = Guarded(spread, torch.float32, offsets[1])
    library.call(
        "accumulate_snapshots",
        out.tensor,
        (ctypes.c_void_p * len(inputs))(*[source.tensor.data_ptr() for source in sources]),
        (ctypes.c_int * len(inputs))(*[emulated.DTYPES[x.dtype] for x in inputs]),
        coefs.contiguous(),
        len(inputs),
        count,
        numel,
        stride,
        compensated,
    )
    out.check_margins()
    rows = out.tensor.reshape(count, stride)
    assert rows[:, numel:].isnan().all(), "written between the rows"
    return [rows[:, :numel]]


def check(
    library: Library,
    dtypes: Sequence[torch.dtype],
    outputs: int,
    numel: int,
    compensated: bool = False,
    offsets: tuple[int, int] = (0, 0),
    stride: int = 0,
) -> None:
    """One input for each dtype, under all schedules."""
    inputs = [emulated.random_tensor(numel, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
    coefs = emulated.random_tensor(len(inputs), outputs, dtype=torch.float64, seed=1000)
    start = emulated.random_tensor(outputs, numel, dtype=torch.float32, seed=1001)
    exact = start.double() + coefs.T @ torch.stack([x.double() for x in inputs])
    rounded = reference.accumulate_snapshots(inputs, coefs, start.clone(), compensated=compensated)
    arguments = (library, inputs, coefs, start, compensated, offsets, stride)
    (out,) = emulated.under_all_schedules(library, partial(accumulate, *arguments))
    emulated.assert_as_accurate(out, rounded, exact, f"{len(dtypes)} -> {outputs}, {numel} {offsets} {stride}")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("accumulate_snapshots")


@pytest.mark.parametrize("compensated", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "numel"), [(1, 1, 1), (1, 5, 1027), (3, 4, 515), (5, 2, 2048)])
def test_matches_formula(
    library: Library,
    inputs: int,
    outputs: int,
    numel: int,
    dtype: torch.dtype,
    offsets: tuple[int, int],
    compensated: bool,
):
    check(library, [dtype] * inputs, outputs, numel, compensated, offsets)


@pytest.mark.parametrize("compensated", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("inputs", [4, 5, 8, 9, 16, 17, 32, 33, 40, 41, MOST_INPUTS])
def test_every_shape_of_tile(library: Library, inputs: int, compensated: bool):
    dtypes = [list(emulated.DTYPES)[i % 3] for i in range(inputs)]
    check(library, dtypes, 7, 1300, compensated)


def test_more_tiles_than_blocks(library: Library):
    check(library, [torch.float16] * 33, 2, 70 * 256 + 3)  # tiles of 256 elements


@pytest.mark.parametrize("stride", [132, 135])
def test_rows_apart(library: Library, stride: int):
    check(library, [torch.bfloat16, torch.float32], 9, 131, stride=stride)


@pytest.mark.parametrize(
    ("inputs", "outputs", "compensated", "launches"),
    [
        (MOST_INPUTS, 2, False, 1),
        (MOST_INPUTS + 1, 2, False, 2),
        (16, 32, False, 1),  # the most coefficients of the small table, one more, and the same in pairs
        (16, 33, False, 1),
        (16, 16, True, 1),
        (16, 17, True, 1),
        (MOST_INPUTS, MOST_COEFS // MOST_INPUTS, False, 1),
        (MOST_INPUTS, MOST_COEFS // MOST_INPUTS + 1, False, 2),
        (MOST_INPUTS, MOST_COEFS // MOST_INPUTS // 2, True, 1),
        (MOST_INPUTS, MOST_COEFS // MOST_INPUTS // 2 + 1, True, 2),
        (1, MOST_COEFS + 1, False, 2),
    ],
)
def test_table_limits(library: Library, inputs: int, outputs: int, compensated: bool, launches: int):
    before = library.launches()
    check(library, [torch.float16] * inputs, outputs, 9, compensated)
    assert (library.launches() - before) / launches in emulated.RUNS


def test_compensation(library: Library):
    """Large coefficients of both signs, as in a reconstruction: the sum is right to the last bit but one."""
    library.schedule(*emulated.SCHEDULES[0])
    inputs = [emulated.random_tensor(1000, dtype=torch.float16, seed=i) for i in range(20)]
    coefs = emulated.random_tensor(20, 3, dtype=torch.float64, seed=99, scale=300)
    coefs[-1] -= coefs.sum(dim=0)
    start = torch.zeros(3, 1000)
    exact = coefs.T @ torch.stack([x.double() for x in inputs])
    (plain,) = accumulate(library, inputs, coefs, start)
    (compensated,) = accumulate(library, inputs, coefs, start, True)
    assert ((compensated.double() - exact).abs() <= 2**-23 * exact.abs()).all()
    assert ((plain.double() - exact).abs() > 2**-23 * exact.abs()).any()


@pytest.mark.parametrize("compensated", [False, True], ids=["plain", "compensated"])
def test_infinities(library: Library, compensated: bool):
    inputs = [torch.tensor([torch.inf, 1.0, torch.inf, torch.nan]), torch.tensor([2.0, -torch.inf, -torch.inf, 1.0])]
    (out,) = accumulate(library, inputs, torch.ones(2, 1, dtype=torch.float64), torch.zeros(1, 4), compensated)
    torch.testing.assert_close(out, torch.tensor([[torch.inf, -torch.inf, torch.nan, torch.nan]]), equal_nan=True)


def test_nothing_to_do(library: Library):
    before = library.launches()
    x = torch.ones(3)
    assert (
        accumulate(library, [torch.empty(0)], torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 0))[0].numel() == 0
    )
    assert accumulate(library, [x], torch.ones(1, 0, dtype=torch.float64), torch.ones(0, 3), stride=3)[0].numel() == 0
    start = torch.ones(1, 3)
    assert torch.equal(accumulate(library, [], torch.ones(0, 1, dtype=torch.float64), start)[0], start)
    assert library.launches() == before


def test_double_is_refused(library: Library):
    out, x = torch.zeros(1, 3), torch.ones(3, dtype=torch.float64)
    pointers, dtypes = (ctypes.c_void_p * 1)(x.data_ptr()), (ctypes.c_int * 1)(1)
    coefs = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(emulated.KernelFault, match="error 1"):
        library.call("accumulate_snapshots", out, pointers, dtypes, coefs, 1, 1, 3, 3, False)
