"""The multi-tensor EMA update: the CUDA kernel under emulation against the formula in float64."""

import ctypes
from functools import partial

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

CHUNK = 8192  # elements one block takes at a time


def update(
    library: Library, params: list[Tensor], emas: list[list[Tensor]], weights: list[float], offsets: tuple[int, int]
) -> list[Tensor]:
    """ema + weight * (param - ema) for emas [profiles][tensors], flattened; offsets of parameters and of averages."""
    sources = [Guarded(p, p.dtype, offsets[0]) for p in params]
    targets = [[Guarded(ema, ema.dtype, offsets[1]) for ema in profile] for profile in emas]
    by_tensor = [profile[t].tensor.data_ptr() for t in range(len(params)) for profile in targets]
    library.call(
        "ema_update",
        (ctypes.c_void_p * len(params))(*[p.tensor.data_ptr() for p in sources]),
        (ctypes.c_void_p * len(by_tensor))(*by_tensor),
        (ctypes.c_int64 * len(params))(*[p.numel() for p in params]),
        len(params),
        (ctypes.c_double * len(weights))(*weights),
        len(weights),
        torch.float32,
    )
    for source, param in zip(sources, params, strict=True):
        assert torch.equal(source.tensor, param), "a parameter was written"
    flat = [target for profile in targets for target in profile]
    for target in flat:
        target.check_margins()
    return [target.tensor for target in flat]


def check(library: Library, sizes: list[int], weights: list[float], offsets: tuple[int, int] = (0, 0)) -> None:
    """All tensors of the given sizes, one profile per weight, under all schedules."""
    params = [emulated.random_tensor(size, dtype=torch.float32, seed=i) for i, size in enumerate(sizes)]
    emas = [
        [emulated.random_tensor(size, dtype=torch.float32, seed=1000 * k + i) for i, size in enumerate(sizes)]
        for k in range(1, 1 + len(weights))
    ]
    results = emulated.under_all_schedules(library, partial(update, library, params, emas, weights, offsets))
    for k, weight in enumerate(weights):
        ema, param = torch.cat(emas[k]), torch.cat(params)
        result = torch.cat(results[k * len(params) : (k + 1) * len(params)])
        exact = ema.double().lerp(param.double(), weight)
        emulated.assert_as_accurate(result, ema.lerp(param, weight), exact, f"profile {k} of {weights}, sizes {sizes}")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("ema_update")


@pytest.mark.parametrize("offsets", [(0, 0), (3, 3), (0, 1)], ids=["aligned", "misaligned", "unequally aligned"])
@pytest.mark.parametrize("weights", [[0.01], [0.3, 1e-6], [0.9, 0.5, 0.1]], ids=len)
def test_matches_formula(library: Library, weights: list[float], offsets: tuple[int, int]):
    check(library, [1, 0, 5, 1023, CHUNK, CHUNK + 1], weights, offsets)


@pytest.mark.parametrize("number", range(4))
def test_one_misaligned_tensor(library: Library, number: int):
    """A parameter, or one of its averages."""
    with emulated.misaligned(number):
        check(library, [1025], [0.3, 0.9, 0.1])


def test_more_chunks_than_blocks(library: Library):
    check(library, [40 * CHUNK + 3], [0.25])


@pytest.mark.parametrize(
    ("tensors", "profiles", "launches"),
    [
        (96, 2, 1),  # the most tensors a table describes
        (97, 2, 2),
        (300, 1, 4),
        (12, 25, 1),  # 312 of 320 pointers
        (13, 25, 2),
        (9, 32, 1),  # the most profiles a table describes, and one more
        (9, 33, 2),
    ],
)
def test_table_limits(library: Library, tensors: int, profiles: int, launches: int):
    before = library.launches()
    check(library, [1 + i % 7 for i in range(tensors)], [1 / (2 + k) for k in range(profiles)])
    assert (library.launches() - before) / launches in emulated.RUNS


def test_weight_one_copies(library: Library):
    param = torch.tensor([1e-3, 3.0, -7.7])
    ema = torch.tensor([1e6, torch.finfo(torch.float32).max, 0.1])
    assert torch.equal(update(library, [param], [[ema]], [1.0], (0, 0))[0], param)


def test_nothing_to_do(library: Library):
    before = library.launches()
    assert update(library, [], [[]], [0.5], (0, 0)) == []
    assert update(library, [torch.empty(0)], [[torch.empty(0)]], [0.5], (0, 0))[0].numel() == 0
    assert update(library, [torch.ones(3)], [], [], (0, 0)) == []
    assert library.launches() == before


def test_only_float32(library: Library):
    arrays = (ctypes.c_void_p * 1)(), (ctypes.c_void_p * 1)(), (ctypes.c_int64 * 1)()
    with pytest.raises(emulated.KernelFault, match="error 1"):
        library.call("ema_update", *arrays, 1, (ctypes.c_double * 1)(0.5), 1, torch.float64)
