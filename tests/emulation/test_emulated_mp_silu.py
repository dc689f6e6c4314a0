"""MP-SiLU, modulated or not, with or without dropout, and backwards: CUDA kernels against the float64 reference."""

import itertools
from functools import partial
from typing import NamedTuple

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

# ---- element-wise ----


def forward(library: Library, x: Tensor, offset_x: int = 0, offset_y: int = 0) -> list[Tensor]:
    """mp_silu of x [numel]."""
    source, y = Guarded(x, x.dtype, offset_x), Guarded(x.numel(), x.dtype, offset_y)
    library.call("mp_silu", source.tensor, y.tensor, x.numel(), x.dtype)
    y.check_margins()
    return [y.tensor]


def backward(library: Library, grad: Tensor, x: Tensor, offset_x: int = 0, offset_grad: int = 0) -> list[Tensor]:
    """The gradient of x [numel]; the two gradients are aligned alike."""
    grad_y, source = Guarded(grad, x.dtype, offset_grad), Guarded(x, x.dtype, offset_x)
    grad_x = Guarded(x.numel(), x.dtype, offset_grad)
    library.call("mp_silu_backward", grad_y.tensor, source.tensor, grad_x.tensor, x.numel(), x.dtype)
    grad_x.check_margins()
    return [grad_x.tensor]


def plain(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient in plain torch, in x's dtype."""
    x = x.detach().requires_grad_()
    y = reference.mp_silu(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def check(library: Library, numel: int, dtype: torch.dtype, offsets: tuple[int, int]) -> None:
    """Forward and backward under all schedules."""
    x = emulated.random_tensor(numel, dtype=dtype, scale=4)
    grad = emulated.random_tensor(numel, dtype=dtype, seed=1)
    what = f"{numel} {dtype} {offsets}"
    exact, exact_grad = plain(x.double(), grad.double())
    rounded, rounded_grad = plain(x, grad)
    (y,) = emulated.under_all_schedules(library, partial(forward, library, x, *offsets))
    emulated.assert_as_accurate(y, rounded, exact, f"y, {what}")
    (grad_x,) = emulated.under_all_schedules(library, partial(backward, library, grad, x, *offsets))
    emulated.assert_as_accurate(grad_x, rounded_grad, exact_grad, f"grad_x, {what}")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("mp_silu")


@pytest.mark.parametrize("offsets", [(0, 0), (3, 3), (0, 1)], ids=["aligned", "misaligned", "unequally aligned"])
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 255, 4099, 70001])
def test_matches_reference(library: Library, numel: int, dtype: torch.dtype, offsets: tuple[int, int]):
    check(library, numel, dtype, offsets)


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
def test_extreme_values(library: Library, dtype: torch.dtype):
    x = torch.tensor([0.0, -0.0, 80.0, -80.0, 6e4, -6e4, torch.inf, torch.nan], dtype=dtype)
    (y,) = forward(library, x)
    torch.testing.assert_close(y, reference.mp_silu(x), equal_nan=True)
    (grad_x,) = backward(library, torch.ones_like(x), x)
    expected = torch.tensor([0.5, 0.5, 1, 0, 1, 0, torch.nan, torch.nan], dtype=dtype) / 0.596
    torch.testing.assert_close(grad_x, expected, equal_nan=True)


# ---- modulated ----


class Case(NamedTuple):
    """x is [n, c, p]; every tensor starts `offset` elements past a 16-byte boundary."""

    n: int
    c: int
    p: int
    offset: int = 0
    layouts: tuple[str, ...] = ("nchw", "nhwc")


# One 16-byte pack holds 8 elements of 16 bits, or 4 of 32. Pixels are summed in chunks of 144 (nhwc) or 4096 (nchw).
CASES = [
    Case(1, 1, 1),
    Case(2, 3, 5),
    Case(2, 24, 16),  # packs only, both layouts
    Case(3, 40, 145, layouts=("nhwc",)),  # a second chunk of one pixel
    Case(1, 264, 289, layouts=("nhwc",)),  # three chunks; 33 columns of packs (16 bits) make two tiles
    Case(2, 77, 7),  # 77 columns of single elements make three tiles
    Case(1, 2072, 3, layouts=("nhwc",)),
    Case(2, 2, 4095, layouts=("nchw",)),
    Case(1, 3, 8197, layouts=("nchw",)),  # three chunks of a plane, each aligned differently
    Case(2, 16, 24, offset=1),
    Case(3, 17, 40, offset=5),
    Case(40, 8, 2),  # more tiles and planes than the grid has blocks
    Case(300, 1, 3),
    Case(1, 2, 0),
]


class Dropout(NamedTuple):
    """As the launchers and the reference get it."""

    philox: Tensor | None = None
    subsequence: int = 0
    threshold: int = 0

    @property
    def options(self) -> dict[str, object]:
        return {"dropout": self.threshold / 2**16, "philox": self.philox, "subsequence": self.subsequence}


NO_DROPOUT = Dropout()
DROPOUT = Dropout(torch.tensor([0x123456789ABCDEF, -0x7EDCBA9876543211]), 40_000, 20_000)


def modulated(
    library: Library, x: Tensor, c: Tensor, channels_last: bool, offset: int = 0, dropout: Dropout = NO_DROPOUT
) -> list[Tensor]:
    """mp_silu(x * c) of x [N, C, P] and c [N, C], and dropout."""
    source = Guarded(emulated.to_memory(x, channels_last), x.dtype, offset)
    scale = Guarded(c, x.dtype, offset)
    y = Guarded(x.numel(), x.dtype, offset)
    library.call("mp_silu_modulated", source.tensor, scale.tensor, y.tensor, *x.shape, channels_last, x.dtype, *dropout)
    y.check_margins()
    return [emulated.from_memory(y.tensor, x.shape, channels_last)]


def modulated_backward(
    library: Library,
    grad: Tensor,
    x: Tensor,
    c: Tensor,
    channels_last: bool,
    offset: int = 0,
    dropout: Dropout = NO_DROPOUT,
) -> list[Tensor]:
    """The gradients of x and c."""
    dtype = x.dtype
    inputs = [Guarded(emulated.to_memory(t, channels_last), dtype, offset) for t in (grad, x)] + [
        Guarded(c, dtype, offset)
    ]
    grad_x, grad_c = Guarded(x.numel(), dtype, offset), Guarded(c.numel(), dtype, offset)
    floats = library.int64("mp_silu_modulated_backward_workspace", *x.shape, channels_last)
    workspace = Guarded(floats, torch.float32)
    tensors = [t.tensor for t in (*inputs, grad_x, grad_c, workspace)]
    library.call("mp_silu_modulated_backward", *tensors, *x.shape, channels_last, dtype, *dropout)
    for output in (grad_x, grad_c, workspace):
        output.check_margins()
    return [emulated.from_memory(grad_x.tensor, x.shape, channels_last), grad_c.tensor.reshape(c.shape)]


def plain_modulated(x: Tensor, c: Tensor, grad: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients in plain torch, in x's dtype."""
    x, c = x.detach().requires_grad_(), c.detach().requires_grad_()
    y = reference.mp_silu_modulated(x, c, **dropout.options)
    return y.detach(), *torch.autograd.grad(y, (x, c), grad)


def check_modulated(library: Library, case: Case, dtype: torch.dtype, dropout: Dropout = NO_DROPOUT) -> None:
    """Forward and backward in both layouts under all schedules."""
    shape = (case.n, case.c, case.p)
    x = emulated.random_tensor(*shape, dtype=dtype)
    c = emulated.random_tensor(case.n, case.c, dtype=dtype, seed=1)
    grad = emulated.random_tensor(*shape, dtype=dtype, seed=2)
    exact = plain_modulated(x.double(), c.double(), grad.double(), dropout)
    rounded = plain_modulated(x, c, grad, dropout)
    for layout in case.layouts:
        arguments = (c, layout == "nhwc", case.offset, dropout)
        outputs = emulated.under_all_schedules(library, partial(modulated, library, x, *arguments))
        outputs += emulated.under_all_schedules(library, partial(modulated_backward, library, grad, x, *arguments))
        for name, out, low, high in zip(("y", "grad_x", "grad_c"), outputs, rounded, exact, strict=True):
            emulated.assert_as_accurate(out, low, high, f"{name}, {case} {dtype} {layout}")


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_modulated_matches_reference(library: Library, case: Case, dtype: torch.dtype):
    check_modulated(library, case, dtype)


DROPOUT_CASES = [case for case in CASES if case.c < 2000]


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("case", DROPOUT_CASES, ids=str)
def test_dropout_matches_reference(library: Library, case: Case, dtype: torch.dtype):
    check_modulated(library, case, dtype, DROPOUT)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [1, 32768, 65535])
def test_the_mask_is_that_of_the_reference(library: Library, threshold: int, dtype: torch.dtype, channels_last: bool):
    dropout = Dropout(torch.tensor([-1, 1 << 40]), 65535, threshold)
    x = torch.ones(2, 24, 700, dtype=dtype)
    (y,) = modulated(library, x, torch.ones(2, 24, dtype=dtype), channels_last, 0, dropout)
    assert torch.equal(y != 0, reference.dropout_mask(x.shape, threshold, dropout.philox, 65535))


@pytest.mark.parametrize("block", [0, 0x89ABCDEF, 0x7FFF_89ABCDEF, 0xFFFF_FFFFFFFF])
def test_bits_of_large_activations(library: Library, block: int):
    """48 bits of the block, 16 of the subsequence, 64 of the offset make the counter."""
    seed, offset, subsequence = 0x123456789ABCDEF, -0x7EDCBA9876543211, 0x8001
    words = torch.zeros(4, dtype=torch.int32)
    library.run("dropout_bits", words, block, subsequence, seed, offset)
    counter = (block, block >> 32 | subsequence << 16, offset, offset >> 32)
    expected = reference.philox_4x32(
        *([torch.tensor(part & 0xFFFFFFFF) for part in parts] for parts in (counter, (seed, seed >> 32)))
    )
    assert [word & 0xFFFFFFFF for word in words.tolist()] == [int(word) for word in expected]


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("number", range(5))
def test_one_misaligned_tensor(library: Library, number: int, dtype: torch.dtype):
    """Packs need every tensor aligned, in the layout whose channels would allow them."""
    with emulated.misaligned(number):
        check_modulated(library, Case(2, 24, 16), dtype)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_workspace_is_below_one_percent_of_the_traffic(library: Library, channels_last: bool):
    for shape in itertools.product([1, 32], [3, 64, 768], [1, 64, 144, 145, 256, 4096, 4097, 65536]):
        floats = library.int64("mp_silu_modulated_backward_workspace", *shape, channels_last)
        moved = 3 * shape[0] * shape[1] * shape[2] * 2  # two reads and a write of 16 bits
        assert 4 * floats <= 0.01 * moved, shape
