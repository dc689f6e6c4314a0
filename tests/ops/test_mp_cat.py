"""MP-Cat, alone and with MP-SiLU."""

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, compare

from edm2ext import ops, reference

SHAPES = [
    ((2, 3, 5, 7), (2, 4, 5, 7)),
    ((1, 65, 3, 3), (1, 1, 3, 3)),
    ((3, 5), (3, 2)),
    ((2, 6, 11), (2, 6, 11)),
    ((2, 3, 2, 3, 5), (2, 1, 2, 3, 5)),
    ((0, 4, 3, 3), (0, 2, 3, 3)),
]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes_and_dtypes(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, silu: bool) -> None:
    compare("mp_cat", [torch.randn(shape) for shape in shapes], dtype=dtype, silu=silu)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("expanded_grad", [False, True])
def test_layouts(layout: str, expanded_grad: bool, silu: bool) -> None:
    inputs = [torch.randn(2, 24, 5, 7), torch.randn(2, 17, 5, 7)]
    compare("mp_cat", inputs, layout=layout, expanded_grad=expanded_grad, silu=silu, t=0.3)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_blending_factors(t: float) -> None:
    compare("mp_cat", [torch.randn(2, 3, 4), torch.randn(2, 5, 4)], t=t)


@pytest.mark.parametrize("silu", [False, True])
def test_layouts_of_the_two_may_differ(silu: bool) -> None:
    a, b = torch.randn(2, 5, 3, 7), torch.randn(2, 4, 3, 7).contiguous(memory_format=torch.channels_last)
    for pair in ((a, b), (b, a)):
        left, right = (x.clone().requires_grad_() for x in pair)
        out, expected = ops.mp_cat(left, right, silu=silu), reference.mp_cat(left, right, silu=silu)
        torch.testing.assert_close(out, expected)
        grads = [torch.randn(2, 9, 3, 7) for _ in range(1 + silu)]
        got = torch.autograd.grad(out, (left, right), grads)
        torch.testing.assert_close(got, torch.autograd.grad(expected, (left, right), grads))


@pytest.mark.parametrize("silu", [False, True])
def test_gradient_of_one_input_alone(backend: str, silu: bool) -> None:
    a, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 2, 4, requires_grad=True)

    def total(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = ops.mp_cat(a, b, 0.3, silu=silu)
        return (out[1] if silu else out).square().sum()

    both = torch.autograd.grad(total(a, b), (a, b))
    torch.testing.assert_close(torch.autograd.grad(total(a, b.detach()), a)[0], both[0])
    torch.testing.assert_close(torch.autograd.grad(total(a.detach(), b), b)[0], both[1])


def test_autocast_takes_the_wider_dtype(backend: str) -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.mp_cat(a, b), ops.mp_cat(a, b.float()))


def test_bad_input(backend: str) -> None:
    a = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"mp_cat: a and b must agree in all dimensions but 1, got \[2, 3, 4, 4\] and"):
        ops.mp_cat(a, torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"mp_cat: a and b must have at least one channel"):
        ops.mp_cat(a, a[:, :0])
    with pytest.raises(TypeError, match=r"mp_cat: a and b must have one dtype"):
        ops.mp_cat(a, a.bfloat16())
    with pytest.raises(ValueError, match=r"mp_cat: t must be in \[0, 1\], got -0.1"):
        ops.mp_cat(a, a, t=-0.1)
    with pytest.raises(ValueError, match=r"mp_cat: a must be \[batch, channels, ...\]"):
        ops.mp_cat(torch.randn(3), torch.randn(3))
