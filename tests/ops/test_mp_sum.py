"""MP-Sum with and without activation clipping."""

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, compare

from edm2ext import ops, reference

SHAPES = [(7,), (), (3, 5), (2, 3, 5, 7), (4, 16, 8, 8), (2, 3, 2, 3, 5), (0, 4, 3, 3)]


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype, clip: float | None) -> None:
    compare("mp_sum", _away_from_the_clip(shape, dtype), dtype=dtype, t=0.3, clip=clip)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("expanded_grad", [False, True])
def test_layouts(layout: str, expanded_grad: bool, clip: float | None) -> None:
    inputs = _away_from_the_clip((2, 5, 3, 7), torch.float32)
    compare("mp_sum", inputs, layout=layout, expanded_grad=expanded_grad, clip=clip)


def _away_from_the_clip(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Inputs whose blend is not so close to +-0.7 that rounding decides whether the gradient passes."""
    a, b = torch.randn(shape).to(dtype).float(), torch.randn(shape).to(dtype).float()
    near = (reference.mp_sum(a, b, 0.3).abs() - 0.7).abs() < 0.02
    near |= (reference.mp_sum(a, b, 0.5).abs() - 0.7).abs() < 0.02
    return [a.masked_fill(near, 0), b.masked_fill(near, 0)]


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_blending_factors(t: float) -> None:
    compare("mp_sum", [torch.randn(3, 4), torch.randn(3, 4)], t=t)


def test_layouts_of_the_two_may_differ() -> None:
    a, b = torch.randn(2, 5, 3, 7), torch.randn(2, 5, 3, 7).contiguous(memory_format=torch.channels_last)
    for left, right in ((a, b), (b, a)):
        left, right = left.clone().requires_grad_(), right.clone().requires_grad_()
        out = ops.mp_sum(left, right, clip=1.0)
        torch.testing.assert_close(out, reference.mp_sum(left, right, clip=1.0))
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, (left, right), grad)
        expected = torch.autograd.grad(reference.mp_sum(left, right, clip=1.0), (left, right), grad)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_passes_at_the_clip_and_stops_beyond(backend: str, dtype: torch.dtype) -> None:
    a = torch.tensor([0.5, 1.0, 1.125, -1.0, -1.125] * 2, dtype=dtype, requires_grad=True)  # exact in every dtype
    out = ops.mp_sum(a, torch.zeros(10, dtype=dtype), t=0.0, clip=1.0)
    out.sum().backward()
    assert torch.equal(out, torch.tensor([0.5, 1.0, 1.0, -1.0, -1.0] * 2, dtype=dtype))
    assert torch.equal(a.grad, torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0] * 2, dtype=dtype))


def test_nan_stays_and_stops_the_gradient(backend: str) -> None:
    a = torch.full([11], torch.nan, requires_grad=True)
    out = ops.mp_sum(a, torch.zeros(11), clip=1.0)
    out.sum().backward()
    assert out.isnan().all()
    assert not a.grad.any()


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_two_users(shape: tuple[int, ...], dtype: torch.dtype, clip: float | None) -> None:
    compare("mp_sum", _away_from_the_clip(shape, dtype), dtype=dtype, t=0.3, clip=clip, twice=True)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_users_and_layouts(layout: str, clip: float | None) -> None:
    inputs = _away_from_the_clip((2, 5, 3, 7), torch.float32)
    compare("mp_sum", inputs, layout=layout, expanded_grad=True, clip=clip, twice=True)


@pytest.mark.parametrize("clip", [None, 0.7])
def test_the_second_user_may_do_without_a_gradient(backend: str, clip: float | None) -> None:
    a, b = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    pair = ops.mp_sum(a, b, 0.3, clip, twice=True)
    assert torch.equal(*pair)
    expected = torch.autograd.grad(ops.mp_sum(a, b, 0.3, clip).sin().sum(), (a, b))
    for y in pair:
        torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), (a, b), retain_graph=True), expected)


def test_two_users_share_memory(backend: str) -> None:
    a = torch.randn(3, 5)
    for x in (a, a.clone().requires_grad_()):
        first, second = ops.mp_sum(x, a, twice=True)
        assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradient_of_one_input_alone(backend: str, clip: float | None) -> None:
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    both = torch.autograd.grad(ops.mp_sum(a, b, 0.3, clip).sum(), (a, b))
    for i, x in enumerate((a, b)):
        others = [y if y is x else y.detach() for y in (a, b)]
        (grad,) = torch.autograd.grad(ops.mp_sum(*others, 0.3, clip).sum(), x)
        torch.testing.assert_close(grad, both[i])


def test_autocast_takes_the_wider_dtype(backend: str) -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.mp_sum(a, b), ops.mp_sum(a, b.float()))
        assert ops.mp_sum(b, b).dtype == torch.bfloat16


def test_bad_input(backend: str) -> None:
    a = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"mp_sum: a and b must have one shape, got \[2, 3\] and \[3, 2\]"):
        ops.mp_sum(a, a.T)
    with pytest.raises(TypeError, match=r"mp_sum: a and b must have one dtype, got torch.float32 and torch.float64"):
        ops.mp_sum(a, a.double())
    with pytest.raises(TypeError, match="mp_sum: b must be a tensor, got float"):
        ops.mp_sum(a, 1.0)
    with pytest.raises(ValueError, match=r"mp_sum: t must be in \[0, 1\], got 1.5"):
        ops.mp_sum(a, a, t=1.5)
    with pytest.raises(ValueError, match="mp_sum: clip must be positive or None, got -1"):
        ops.mp_sum(a, a, clip=-1)
    with pytest.raises(ValueError, match="mp_sum: a and b must be on one device, got cpu and meta"):
        ops.mp_sum(a, a.to("meta"))
