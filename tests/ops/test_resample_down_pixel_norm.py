"""Downsampling with pixel norm and MP-SiLU of the result."""

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, assert_accurate, compare

from edm2ext import ops, set_backend

NAME = "resample_down_pixel_norm"
SHAPES = [(2, 3, 8, 8), (1, 5, 7, 9), (2, 17, 2, 3), (1, 1, 2, 2), (3, 70, 5, 4), (1, 3, 4, 140), (0, 4, 4, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(NAME, [torch.randn(shape)], dtype=dtype)


@pytest.mark.parametrize("expanded_grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, expanded_grad: bool) -> None:
    for shape in ((2, 19, 6, 10), (2, 5, 7, 5)):
        compare(NAME, [torch.randn(shape)], layout=layout, expanded_grad=expanded_grad, eps=0.3)


@pytest.mark.parametrize("filter", [(1, 3, 3, 1), (1, 2), (2, 2)])
def test_other_filters(filter: tuple[float, ...]) -> None:
    compare(NAME, [torch.randn(2, 5, 6, 7)], filter=filter)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_composition(backend: str, dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 24, 6, 9).to(dtype))
    composed = ops.pixel_norm(ops.resample_down(x), silu=True)
    truth = ops.pixel_norm(ops.resample_down(x.double()), silu=True)
    for got, same_dtype, exact in zip(ops.resample_down_pixel_norm(x), composed, truth, strict=True):
        assert_accurate(got, same_dtype, exact)


def test_zero_pixels_have_zero_subgradient(backend: str) -> None:
    x = torch.zeros(1, 3, 4, 4, requires_grad=True)
    y, y_silu = ops.resample_down_pixel_norm(x)
    assert y.count_nonzero() == 0
    (grad,) = torch.autograd.grad((y, y_silu), x, [torch.ones_like(y), torch.zeros_like(y)])
    torch.testing.assert_close(grad, torch.full_like(x, 0.25e4))


def test_one_output_used(backend: str) -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    for index in (0, 1):
        expected = torch.autograd.grad(ops.pixel_norm(ops.resample_down(x), silu=True)[index].sum(), x)
        torch.testing.assert_close(torch.autograd.grad(ops.resample_down_pixel_norm(x)[index].sum(), x), expected)


def test_input_is_not_kept() -> None:
    saved: list[int] = []
    x = torch.randn(2, 8, 8, 8, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with set_backend("native"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.resample_down_pixel_norm(x)
    assert saved == [x.numel() // 4, x.numel() // 32]


def test_bad_input(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"{NAME}: x must be \[batch, channels, height, width\], got shape \[3, 4\]"):
        ops.resample_down_pixel_norm(torch.randn(3, 4))
    with pytest.raises(ValueError, match=rf"{NAME}: x must be at least 2 pixels high and wide, got \[1, 1, 1, 4\]"):
        ops.resample_down_pixel_norm(torch.randn(1, 1, 1, 4))
    with pytest.raises(ValueError, match=f"{NAME}: filter must have an even number of taps, got 3"):
        ops.resample_down_pixel_norm(torch.randn(1, 1, 4, 4), (1, 2, 1))
    with pytest.raises(ValueError, match=f"{NAME}: eps must be positive, got 0"):
        ops.resample_down_pixel_norm(torch.randn(1, 1, 4, 4), eps=0)
