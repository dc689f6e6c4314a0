"""Pixel norm, alone and with MP-SiLU."""

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, compare

from edm2ext import ops, reference

SHAPES = [(2, 3, 5, 7), (3, 130, 1, 9), (1, 1, 1, 1), (2, 64, 8, 8), (5, 7), (2, 6, 11), (2, 3, 2, 3, 5), (0, 4, 3, 3)]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype, silu: bool) -> None:
    compare("pixel_norm", [torch.randn(shape)], dtype=dtype, silu=silu)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (2, 37, 3, 4, 2), (3, 16, 1, 1), (2, 1, 4, 4)])
def test_layouts(shape: tuple[int, ...], layout: str, silu: bool) -> None:
    compare("pixel_norm", [torch.randn(shape)], layout=layout, silu=silu)
    compare("pixel_norm", [torch.randn(shape)], layout=layout, silu=silu, expanded_grad=True)


def test_small_magnitudes_where_eps_matters() -> None:
    compare("pixel_norm", [torch.randn(2, 8, 4, 4) * 1e-5])
    compare("pixel_norm", [torch.randn(2, 8, 4, 4)], eps=0.3)


def test_zero_pixels_have_zero_output_and_gradient_over_eps(backend: str) -> None:
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    y = ops.pixel_norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e4))


def test_fp16_on_the_cpu_is_the_reference(backend: str) -> None:
    x = torch.randn(2, 8, 4, 4, dtype=torch.float16)
    assert torch.equal(ops.pixel_norm(x), reference.pixel_norm(x))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(3), ValueError, r"pixel_norm: x must be \[batch, channels, ...\], got shape \[3\]"),
        (
            torch.ones(2, 3, dtype=torch.int64),
            TypeError,
            "pixel_norm: x must be a floating-point tensor, got torch.int64",
        ),
        ([1.0], TypeError, "pixel_norm: x must be a tensor, got list"),
    ],
)
def test_bad_input(backend: str, x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.pixel_norm(x)


def test_bad_eps(backend: str) -> None:
    with pytest.raises(ValueError, match="pixel_norm: eps must be positive, got 0"):
        ops.pixel_norm(torch.randn(2, 3), eps=0)
