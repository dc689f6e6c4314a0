"""MP-Fourier features."""

import math

import pytest
import torch
from op_testing import DTYPES, compare

from edm2ext import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (7, 33), (5, 192), (0, 4)])
def test_shapes_and_dtypes(batch: int, channels: int, dtype: torch.dtype) -> None:
    freqs, phases = 2 * math.pi * torch.randn(channels), 2 * math.pi * torch.rand(channels)
    compare("mp_fourier", [torch.randn(batch), freqs, phases], dtype=dtype)


@pytest.mark.parametrize("layout", ["strided", "contiguous"])
def test_layouts(layout: str) -> None:
    inputs = [torch.randn(5), torch.randn(9), torch.rand(9)]
    compare("mp_fourier", inputs, layout=layout, expanded_grad=True)


def test_buffers_stored_in_half_precision_are_computed_with_in_float32(backend: str) -> None:
    x, freqs, phases = torch.randn(5), torch.randn(9).half(), torch.rand(9).half()
    out = ops.mp_fourier(x, freqs, phases)
    assert out.dtype == torch.float32
    assert torch.equal(out, ops.mp_fourier(x, freqs.float(), phases.float()))


def test_bad_input(backend: str) -> None:
    x, freqs = torch.randn(3), torch.randn(4)
    with pytest.raises(ValueError, match=r"mp_fourier: x must have one dimension, got shape \[3, 1\]"):
        ops.mp_fourier(x[:, None], freqs, freqs)
    with pytest.raises(ValueError, match="mp_fourier: freqs and phases must have one length, got 4 and 3"):
        ops.mp_fourier(x, freqs, x)
    with pytest.raises(TypeError, match=r"mp_fourier: x must be a floating-point tensor, got torch.int64"):
        ops.mp_fourier(torch.arange(3), freqs, freqs)
