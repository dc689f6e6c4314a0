"""A convolution of an MP-Cat, with MP-SiLU of the latter."""

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, compare

from edm2ext import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3])
def test_kernels_and_dtypes(dtype: torch.dtype, kernel: int) -> None:
    inputs = [torch.randn(2, 5, 9, 7), torch.randn(2, 3, 9, 7), torch.randn(6, 8, kernel, kernel)]
    compare("mp_cat_conv2d", inputs, dtype=dtype, gain=torch.tensor(0.8), t=0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    inputs = [torch.randn(2, 64, 4, 4), torch.randn(2, 32, 4, 4), torch.randn(8, 96, 1, 1)]
    compare("mp_cat_conv2d", inputs, layout=layout, expanded_grad=True)


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding": 0}])
def test_options(options: dict[str, int]) -> None:
    groups = options.get("groups", 1)
    inputs = [torch.randn(2, 6, 9, 8), torch.randn(2, 4, 9, 8), torch.randn(4, 10 // groups, 3, 3)]
    compare("mp_cat_conv2d", inputs, **options)


def test_is_both_ops(backend: str) -> None:
    a, b, w, gain = torch.randn(2, 5, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(6, 8, 1, 1), torch.tensor(0.7)
    x, x_silu = ops.mp_cat(a, b, 0.3, silu=True)
    for got in (
        ops.mp_cat_conv2d(a, b, w, gain, 0.3),
        ops.mp_cat_conv2d(a, b, ops.effective_weight(w, gain), t=0.3, prepared=True),
    ):
        assert torch.equal(got[0], ops.mp_conv2d(x, w, gain))
        assert torch.equal(got[1], x_silu)
    joined = ops.CatWith(b, 0.3)(a)
    assert torch.equal(joined[0], x)
    assert torch.equal(joined[1], x_silu)


def test_bad_input(backend: str) -> None:
    a, w = torch.randn(2, 3, 4, 4), torch.randn(4, 6, 1, 1)
    with pytest.raises(ValueError, match="mp_cat: a and b must agree in all dimensions but 1"):
        ops.mp_cat_conv2d(a, a[..., :3], w)
    with pytest.raises(ValueError, match="mp_conv2d: x must have 6 channels"):
        ops.mp_cat_conv2d(a, a[:, :2], w)
    with pytest.raises(ValueError, match=r"mp_cat: t must be in \[0, 1\], got 2"):
        ops.mp_cat_conv2d(a, a, w, t=2)
    with pytest.raises(ValueError, match="mp_conv2d: gain must be 1 with a prepared weight"):
        ops.mp_cat_conv2d(a, a, w, 0.5, prepared=True)
