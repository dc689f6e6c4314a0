"""Weighted sums of snapshots."""

import sys

import numpy as np
import pytest
import torch
from op_testing import assert_accurate

from edm2ext import ops, reference, set_backend
from edm2ext.ops.accumulate_snapshots import sum_snapshots


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 5), (9, 2)])
@pytest.mark.parametrize("shape", [(257,), (40, 24, 3, 3), (0, 2)])
def test_against_float64(
    shape: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, compensated: bool
) -> None:
    snapshots = [torch.randn(shape).to(dtype) for _ in range(inputs)]
    coefs = torch.randn(inputs, outputs, dtype=torch.float64)
    start = torch.randn(outputs, *shape)
    with set_backend("native"):
        native = ops.accumulate_snapshots(snapshots, coefs, start.clone(), compensated=compensated)
        fresh = ops.accumulate_snapshots(snapshots, coefs, compensated=compensated)
    plain = reference.accumulate_snapshots(snapshots, coefs, start.clone(), compensated=compensated)
    total = torch.tensordot(coefs.T, torch.stack([x.double() for x in snapshots]), dims=1)
    assert native.dtype == fresh.dtype == torch.float32
    assert_accurate(native, plain, total + start.double())
    assert_accurate(fresh, reference.accumulate_snapshots(snapshots, coefs, compensated=compensated), total)


def test_compensated_sums_are_rounded_once(backend: str) -> None:
    """Large coefficients of both signs, as in a reconstruction."""
    snapshots = [torch.randn(1000).half() for _ in range(20)]
    coefs = 300 * torch.randn(20, 3, dtype=torch.float64)
    coefs[-1] -= coefs.sum(dim=0)
    exact = coefs.T @ torch.stack([x.double() for x in snapshots])
    out = ops.accumulate_snapshots(snapshots, coefs, compensated=True)
    assert ((out.double() - exact).abs() <= 2**-23 * exact.abs()).all()
    plain = ops.accumulate_snapshots(snapshots, coefs)
    assert ((plain.double() - exact).abs() > 2**-23 * exact.abs()).any()


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("buffer_bytes", [1, 120, 1 << 20])
@pytest.mark.parametrize("shape", [(), (40,), (7, 33), (0, 2)])
def test_streaming_in_pieces(backend: str, shape: tuple[int, ...], buffer_bytes: int, compensated: bool) -> None:
    """What inputs on the CPU go through on their way to a GPU, with the CPU in the place of the GPU."""
    stream = sys.modules["edm2ext.ops.accumulate_snapshots"]._stream
    snapshots = [
        torch.randn(shape),
        torch.randn(shape).half(),
        torch.randn(shape[::-1]).bfloat16().permute(tuple(range(len(shape)))[::-1]),
    ]
    coefs = torch.randn(3, 4, dtype=torch.float64)
    start = torch.randn(4, *shape)
    expected = ops.accumulate_snapshots(snapshots, coefs, start.clone(), compensated=compensated)
    for out in (start.clone(), torch.stack([start, start], dim=-1)[..., 0]):
        stream(snapshots, coefs, out, compensated, buffer_bytes=buffer_bytes)
        torch.testing.assert_close(out, expected)


def test_adds_into_out_and_returns_it(backend: str) -> None:
    out = torch.ones(2, 3)
    assert ops.accumulate_snapshots([torch.full((3,), 2.0)], [[1.0, 10.0]], out) is out
    assert torch.equal(out, torch.tensor([[3.0] * 3, [21.0] * 3]))


def test_scalars(backend: str) -> None:
    out = ops.accumulate_snapshots([torch.tensor(2.0), torch.tensor(3.0)], [[1.0], [-1.0]])
    assert torch.equal(out, torch.tensor([-1.0]))


def test_coefficients_of_any_kind(backend: str) -> None:
    snapshots = [torch.randn(4), torch.randn(4)]
    coefs = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    expected = ops.accumulate_snapshots(snapshots, torch.from_numpy(coefs))
    for same in (coefs, coefs.tolist(), torch.from_numpy(coefs.T.copy()).T):
        assert torch.equal(ops.accumulate_snapshots(snapshots, same), expected)


def test_mixed_dtypes_and_strided_tensors(backend: str) -> None:
    snapshots = [
        torch.randn(4, 6),
        torch.randn(4, 6).half(),
        torch.randn(4, 12)[:, ::2],
        torch.randn(6, 4).bfloat16().T,
    ]
    out = torch.zeros(4, 6, 2).permute(2, 0, 1)
    ops.accumulate_snapshots(snapshots, np.ones((4, 2)), out)
    expected = sum(x.float() for x in snapshots)
    torch.testing.assert_close(out, torch.stack([expected, expected]))


def test_accumulation_between_forward_and_backward_is_noticed(backend: str) -> None:
    out = torch.randn(1, 3, requires_grad=True)
    loss = out.square().sum()
    ops.accumulate_snapshots([torch.ones(3)], [[1.0]], out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_input(backend: str) -> None:
    x, coefs = torch.randn(3), [[1.0]]
    with pytest.raises(ValueError, match="accumulate_snapshots: inputs must not be empty"):
        ops.accumulate_snapshots([], coefs)
    with pytest.raises(TypeError, match=r"inputs\[0\] must be float16, bfloat16 or float32, got torch.float64"):
        ops.accumulate_snapshots([x.double()], coefs)
    with pytest.raises(ValueError, match=r"inputs\[1\] must be like inputs\[0\] \(\[3\] on cpu\), got \[4\] on cpu"):
        ops.accumulate_snapshots([x, torch.randn(4)], [[1.0], [1.0]])
    with pytest.raises(ValueError, match=r"coefs must be \[1 inputs, outputs\], got shape \[2, 1\]"):
        ops.accumulate_snapshots([x], [[1.0], [1.0]])
    with pytest.raises(TypeError, match=r"out must be float32, got torch.float16"):
        ops.accumulate_snapshots([x], coefs, torch.zeros(1, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"out must be \[1, 3\] on cpu, got \[2, 3\] on cpu"):
        ops.accumulate_snapshots([x], coefs, torch.zeros(2, 3))


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 26), (9, 2), (4, 60)])
@pytest.mark.parametrize("shape", [(1,), (700, 3), (0, 2)])
def test_sums_that_are_stored(
    shape: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype, compensated: bool
) -> None:
    """Rounded once to their type, whatever was there before, and nothing beside them is touched."""
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    snapshots = [torch.randn(shape).to(kinds[n % 3]) for n in range(inputs)]
    coefs = torch.randn(inputs, outputs, dtype=torch.float64)
    exact = torch.tensordot(coefs.T, torch.stack([x.double() for x in snapshots]), dims=1)
    found = {}
    for backend in ("native", "reference"):
        room = torch.full((outputs, shape[0] + 5, *shape[1:]), torch.nan, dtype=dtype)
        with set_backend(backend):
            sum_snapshots(snapshots, coefs, room[:, : shape[0]], compensated=compensated)
        assert room[:, shape[0] :].isnan().all()
        found[backend] = room[:, : shape[0]]
    assert_accurate(found["native"], found["reference"], exact)


def test_every_float16_is_rounded_to() -> None:
    """And what lies between two of them, beyond the largest, and what is no number."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[every.isfinite()]
    between = torch.cat(
        [torch.nextafter(x, far) for x in (every, (every + every.roll(1)) / 2) for far in (-every, every)]
    )
    special = torch.tensor([65519.0, 65520.0, 65536.0, 1e30, torch.inf, torch.nan, 2**-25, 2**-24 * 1.5, 1e-30, 0.0])
    x = torch.cat([every, (every + every.roll(1)) / 2, between, special, -special])
    out = torch.empty(1, len(x), dtype=torch.float16)
    with set_backend("native"):
        sum_snapshots([x], torch.ones(1, 1, dtype=torch.float64), out)
    wanted = x.half()
    assert torch.equal(out[0].isnan(), wanted.isnan())
    assert torch.equal(
        out[0][~wanted.isnan()].view(torch.int16) & 0x7FFF, wanted[~wanted.isnan()].view(torch.int16) & 0x7FFF
    )
    assert torch.equal(out[0].nan_to_num(), wanted.nan_to_num())
