"""MP-SiLU and its modulated form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import DTYPES, LAYOUTS, compare

from edm2ext import ops, reference

SHAPES = [(7,), (), (3, 5), (2, 3, 5, 7), (1, 65, 3, 3), (4, 16, 8, 8), (2, 3, 2, 3, 5), (0, 4, 3, 3)]
MODULATED_SHAPES = [shape for shape in SHAPES if len(shape) >= 2] + [(2, 130, 1, 1), (3, 5, 40), (2, 3, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare("mp_silu", [torch.randn(shape) * 3], dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("expanded_grad", [False, True])
def test_layouts(layout: str, expanded_grad: bool) -> None:
    compare("mp_silu", [torch.randn(2, 5, 3, 7)], layout=layout, expanded_grad=expanded_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_range(dtype: torch.dtype) -> None:
    compare("mp_silu", [torch.tensor([-1e4, -200.0, -90.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 90.0, 1e4])], dtype=dtype)


def test_non_finite_values_pass_through(backend: str) -> None:
    x = torch.tensor([torch.inf, torch.nan, 1.0])
    y = ops.mp_silu(x)
    assert y[0] == torch.inf
    assert y[1].isnan()
    assert y[2].isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MODULATED_SHAPES)
def test_modulated_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare("mp_silu_modulated", [torch.randn(shape), torch.randn(shape[:2]) + 1], dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 70, 5, 3), (2, 6, 3, 4, 2), (3, 16, 1, 1), (30, 1, 4, 4)])
def test_modulated_layouts(shape: tuple[int, ...], layout: str) -> None:
    inputs = [torch.randn(shape), torch.randn(shape[:2])]
    compare("mp_silu_modulated", inputs, layout=layout)
    compare("mp_silu_modulated", inputs, layout=layout, expanded_grad=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_over_many_pixels(layout: str) -> None:
    compare("mp_silu_modulated", [torch.randn(2, 40, 80, 80) * 2, torch.randn(2, 40)], layout=layout)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_modulated_property(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    compare("mp_silu_modulated", [torch.randn(shape), torch.randn(shape[:2])], dtype=dtype, layout=layout)


def test_modulation_is_cast_to_the_dtype_of_x(backend: str) -> None:
    x, c = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    y = ops.mp_silu_modulated(x, c)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert c.grad.dtype == torch.float32
    assert torch.equal(y, ops.mp_silu_modulated(x, c.bfloat16()))


def test_fp16_on_the_cpu_is_the_reference(backend: str) -> None:
    x, c = torch.randn(2, 8, 4, 4, dtype=torch.float16), torch.randn(2, 8)
    assert torch.equal(ops.mp_silu(x), reference.mp_silu(x))
    assert torch.equal(ops.mp_silu_modulated(x, c), reference.mp_silu_modulated(x, c))


def test_bad_input(backend: str) -> None:
    with pytest.raises(TypeError, match=r"mp_silu: x must be a floating-point tensor, got torch.int32"):
        ops.mp_silu(torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"mp_silu_modulated: c must have shape \[2, 3\], got \[2, 4\]"):
        ops.mp_silu_modulated(torch.randn(2, 3, 4, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"mp_silu_modulated: x must be \[batch, channels, ...\], got shape \[3\]"):
        ops.mp_silu_modulated(torch.randn(3), torch.randn(3))
    with pytest.raises(ValueError, match="mp_silu_modulated: x and c must be on one device, got cpu and meta"):
        ops.mp_silu_modulated(torch.randn(2, 3), torch.randn(2, 3, device="meta"))
