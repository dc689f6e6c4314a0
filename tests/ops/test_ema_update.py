"""Multi-tensor EMA update."""

import pytest
import torch
from op_testing import LAYOUTS, assert_accurate

from edm2ext import ops, reference, set_backend

SHAPES = [(), (7,), (5, 3), (40, 24, 3, 3), (3, 1, 1, 1), (0, 4), (17, 300)]
WEIGHTS = [0.01, 0.5, 0.97]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_against_float64(dtype: torch.dtype, layout: str) -> None:
    params = [LAYOUTS[layout](torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    start = [[LAYOUTS[layout](torch.randn(shape, dtype=dtype)) for shape in SHAPES] for _ in WEIGHTS]
    native, plain = ([[ema.clone() for ema in averages] for averages in start] for _ in range(2))
    exact = [[ema.double() for ema in averages] for averages in start]
    with set_backend("native"):
        ops.ema_update_(native, params, WEIGHTS)
    reference.ema_update_(plain, params, WEIGHTS)
    reference.ema_update_(exact, [param.double() for param in params], WEIGHTS)
    for group in zip(native, plain, exact, strict=True):
        for got, same_dtype, truth in zip(*group, strict=True):
            assert_accurate(got, same_dtype, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_one_copies_and_weight_zero_keeps(backend: str, dtype: torch.dtype) -> None:
    params = [torch.randn(5, 3, dtype=dtype), torch.randn(7, dtype=dtype)]
    emas = [[torch.full_like(param, 1e10) for param in params] for _ in range(2)]
    kept = [ema.clone() for ema in emas[1]]
    ops.ema_update_(emas, params, [1.0, 0.0])
    assert all(map(torch.equal, emas[0], params))
    assert all(map(torch.equal, emas[1], kept))


def test_mixed_dtypes_and_layouts(backend: str) -> None:
    params = [
        torch.randn(4, 6),
        torch.randn(5, dtype=torch.float64),
        torch.randn(5, dtype=torch.bfloat16),
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 8)[:, ::2],
    ]
    emas = [[torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params] for _ in WEIGHTS]
    ops.ema_update_(emas, params, WEIGHTS)
    for averages, weight in zip(emas, WEIGHTS, strict=True):
        for ema, param in zip(averages, params, strict=True):
            torch.testing.assert_close(ema, param.to(ema.dtype) * weight)


def test_parameters_that_require_grad(backend: str) -> None:
    param = torch.nn.Parameter(torch.randn(4))
    ema = torch.zeros(4)
    ops.ema_update_([[ema]], [param], [0.5])
    assert not ema.requires_grad
    torch.testing.assert_close(ema, param.detach() / 2)


def test_update_between_forward_and_backward_is_noticed(backend: str) -> None:
    ema = torch.randn(4, requires_grad=True)
    out = ema.square()
    ops.ema_update_([[ema]], [torch.zeros(4)], [0.5])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_to_do(backend: str) -> None:
    ops.ema_update_([], [torch.zeros(3)], [])
    ops.ema_update_([[], []], [], [0.1, 0.2])


def test_bad_input_changes_nothing(backend: str) -> None:
    good, param = torch.zeros(3), torch.ones(3)
    with pytest.raises(
        ValueError, match=r"ema_update_: emas\[1\]\[1\] must have its parameter's shape \[3\], got \[4\]"
    ):
        ops.ema_update_([[good, good], [good, torch.zeros(4)]], [param, param], [0.5, 0.5])
    with pytest.raises(ValueError, match="emas and one_minus_betas must have one entry per profile, got 1 and 2"):
        ops.ema_update_([[good]], [param], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"emas\[0\] must have one tensor per parameter \(2\), got 1"):
        ops.ema_update_([[good]], [param, param], [0.5])
    with pytest.raises(ValueError, match=r"one_minus_betas must be in \[0, 1\], got 1.5"):
        ops.ema_update_([[good]], [param], [1.5])
    with pytest.raises(ValueError, match=r"emas\[0\]\[0\] must be on its parameter's device cpu, got meta"):
        ops.ema_update_([[good.to("meta")]], [param], [0.5])
    with pytest.raises(TypeError, match=r"emas and params must be floating-point tensors, got torch\.int64"):
        ops.ema_update_([[good.long()]], [param], [0.5])
    assert torch.equal(good, torch.zeros(3))
