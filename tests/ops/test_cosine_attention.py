"""Cosine attention."""

import math

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, compare

from edm2ext import ops, reference

# heads, and [N, 3C, *] with few pixels (explicit products) and with many (fused attention)
CASES = [
    (1, (2, 24, 3, 5)),
    (3, (2, 36, 4, 4)),
    (2, (1, 24, 17, 31)),
    (2, (2, 96, 8, 8)),
    (2, (2, 12, 7)),
    (2, (1, 12, 2, 3, 2)),
]


def _units(shape: tuple[int, ...]) -> float:
    """torch's fused attention is less accurate than its plain products."""
    return 8 if math.prod(shape[2:]) > 256 else 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "shape"), CASES)
def test_shapes_and_dtypes(heads: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare("cosine_attention", [torch.randn(shape)], dtype=dtype, num_heads=heads, units=_units(shape))


@pytest.mark.parametrize("expanded_grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "shape"), [(1, (2, 24, 4, 4)), (2, (2, 36, 3, 5)), (2, (2, 24, 16, 17))])
def test_layouts(heads: int, shape: tuple[int, ...], layout: str, expanded_grad: bool) -> None:
    options = {"layout": layout, "expanded_grad": expanded_grad, "units": _units(shape)}
    compare("cosine_attention", [torch.randn(shape)], **options, num_heads=heads)


@pytest.mark.parametrize("pixels", [2, 17])
def test_one_pixel_decides(backend: str, pixels: int) -> None:
    """Queries and keys that agree at one pixel only: its value is taken nearly alone."""
    depth = 320
    q = torch.eye(depth)[:, : pixels**2]
    v = torch.randn(depth, pixels**2)
    qkv = torch.stack([q, q, v], dim=1).reshape(1, 3 * depth, pixels, pixels) * 3
    out = ops.cosine_attention(qkv, 1)
    expected = v / v.square().mean(0).sqrt()
    torch.testing.assert_close(out.reshape(depth, -1), expected, rtol=0, atol=0.2)


def test_reference_by_hand() -> None:
    """Channel (h * d + i) * 3 + j is channel i of head h of q, k or v (spec 2.12)."""
    qkv = torch.randn(1, 12, 3, dtype=torch.float64)
    channels = qkv.reshape(2, 2, 3, 3)
    outs = []
    for head in range(2):
        q, k, v = (channels[head, :, j] / (1e-4 + channels[head, :, j].square().mean(0).sqrt()) for j in range(3))
        weights = (q.T @ k / 2**0.5).softmax(1)
        outs.append(v @ weights.T)
    torch.testing.assert_close(reference.cosine_attention(qkv, 2), torch.cat(outs)[None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pixels", [4, 24])
def test_autocast_sets_the_dtype_of_products(backend: str, dtype: torch.dtype, pixels: int) -> None:
    qkv = torch.randn(2, 48, pixels, pixels, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = ops.cosine_attention(qkv, 2)
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)
    assert grad_qkv.dtype == torch.float32
    exact_in = qkv.detach().double().requires_grad_()
    exact = reference.cosine_attention(exact_in, 2)
    (exact_grad,) = torch.autograd.grad(exact, exact_in, grad.double())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact.double(), rtol=0, atol=8 * unit)
    torch.testing.assert_close(grad_qkv.double(), exact_grad, rtol=0, atol=8 * unit * exact_grad.abs().max().item())


def test_bad_input(backend: str) -> None:
    qkv = torch.randn(1, 12, 2, 2)
    with pytest.raises(ValueError, match=r"cosine_attention: qkv must have 3 \* num_heads \* d channels, got 12 .*=3"):
        ops.cosine_attention(qkv, 3)
    with pytest.raises(ValueError, match="cosine_attention: num_heads must be at least 1, got 0"):
        ops.cosine_attention(qkv, 0)
    with pytest.raises(ValueError, match=r"cosine_attention: qkv must be \[batch, channels, ...\], got shape \[12\]"):
        ops.cosine_attention(qkv[0, :, 0, 0], 1)
