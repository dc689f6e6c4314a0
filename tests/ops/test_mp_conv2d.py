"""Magnitude-preserving convolution and linear layer."""

import pytest
import torch
import torch.nn.functional as F
from op_testing import DTYPES, LAYOUTS, compare

from edm2ext import ops, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_conv_kernels_and_dtypes(dtype: torch.dtype, kernel: int) -> None:
    inputs = [torch.randn(2, 5, 9, 13), torch.randn(7, 5, kernel, kernel), torch.tensor(0.8)]
    compare("mp_conv2d", inputs[:2], dtype=dtype, gain=inputs[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_layouts(layout: str) -> None:
    compare("mp_conv2d", [torch.randn(2, 6, 8, 8), torch.randn(7, 6, 3, 3)], layout=layout, expanded_grad=True)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"dilation": 2},
        {"groups": 2},
        {"padding": 0},
        {"padding": (2, 1), "stride": (1, 2), "dilation": (2, 1)},
    ],
)
def test_conv_options(options: dict[str, object]) -> None:
    groups = options.get("groups", 1)
    compare("mp_conv2d", [torch.randn(2, 6, 9, 8), torch.randn(4, 6 // groups, 3, 3)], **options)


@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
def test_same_padding_keeps_the_size(backend: str, dilation: "int | tuple[int, int]") -> None:
    assert ops.mp_conv2d(torch.randn(1, 2, 9, 8), torch.randn(3, 2, 3, 5), dilation=dilation).shape == (1, 3, 9, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 24), (24,), (2, 3, 24)])
def test_linear_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare("mp_linear", [torch.randn(shape), torch.randn(7, 24)], dtype=dtype, gain=0.5)


def test_weight_follows_the_dtype_of_x(backend: str) -> None:
    w, w2 = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        conv = ops.mp_conv2d(torch.randn(1, 3, 4, 4, dtype=dtype), w)
        linear = ops.mp_linear(torch.randn(2, 3, dtype=dtype), w2)
        assert conv.dtype == linear.dtype == dtype
        (conv.sum() + linear.sum()).backward()
    assert w.grad.dtype == w2.grad.dtype == torch.float32


def test_autocast_sets_the_dtype_of_products(backend: str) -> None:
    x, w = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        conv, linear = ops.mp_conv2d(x, w), ops.mp_linear(x[..., :3], w[..., 0, 0])
        double = ops.mp_conv2d(x.double(), w)
    assert conv.dtype == linear.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    assert torch.equal(conv, ops.mp_conv2d(x.bfloat16(), w))
    assert torch.equal(linear, ops.mp_linear(x[..., :3].bfloat16(), w[..., 0, 0]))


def test_prepared_weight_is_taken_as_it_is(backend: str) -> None:
    x, w, gain = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 3, 3), torch.tensor(0.7)
    assert torch.equal(ops.mp_conv2d(x, w, prepared=True), F.conv2d(x, w, padding=1))
    assert torch.equal(ops.mp_conv2d(x, ops.effective_weight(w, gain), prepared=True), ops.mp_conv2d(x, w, gain))
    y, v = torch.randn(2, 3), torch.randn(4, 3)
    assert torch.equal(ops.mp_linear(y, v, prepared=True), F.linear(y, v))


def test_conv_keeps_channels_last(backend: str) -> None:
    x = torch.randn(2, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    out = ops.mp_conv2d(x, torch.randn(4, 6, 3, 3))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_gain_is_learned(backend: str) -> None:
    x, w, gain = torch.randn(2, 6), torch.randn(4, 6), torch.tensor(0.0, requires_grad=True)
    ops.mp_linear(x, w, gain).sum().backward()
    torch.testing.assert_close(gain.grad, reference.mp_linear(x, w).sum())


X, W = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], W), {}, r"x must be \[batch, channels, height, width\], got shape \[3, 4, 4\]"),
        ((X, W[0]), {}, r"w must be \[out, in / groups, height, width\], got shape \[3, 3, 3\]"),
        ((X[:, :2], W), {}, r"x must have 3 channels for w of shape \[4, 3, 3, 3\] and groups=1, got 2"),
        ((X, W), {"groups": 3}, "groups must divide the 4 output channels, got 3"),
        ((X, W), {"padding": "valid"}, 'padding must be "same" or a number of pixels, got "valid"'),
        ((X, W[..., :2]), {}, 'padding "same" needs an odd kernel size, got 3 x 2'),
        ((X, W, 2.0), {"prepared": True}, "gain must be 1 with a prepared weight"),
        (
            (X, W, torch.ones(1)),
            {},
            r"gain must be a number or a 0-dim floating-point tensor, got a tensor of shape \[1\]",
        ),
        ((X.to("meta"), W), {}, "x and w must be on one device, got meta and cpu"),
    ],
)
def test_bad_conv_input(backend: str, arguments: tuple, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"mp_conv2d: {message}"):
        ops.mp_conv2d(*arguments, **options)


def test_bad_linear_input(backend: str) -> None:
    with pytest.raises(ValueError, match=r"mp_linear: x must be \[..., 3\] for w of shape \[4, 3\], got \[2, 4\]"):
        ops.mp_linear(torch.randn(2, 4), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"mp_linear: w must be \[out, in\], got shape \[4, 3, 3, 3\]"):
        ops.mp_linear(X, W)
    with pytest.raises(ValueError, match="mp_linear: gain must be 1 with a prepared weight"):
        ops.mp_linear(X, W[0, 0], torch.tensor(1.0), prepared=True)
    with pytest.raises(TypeError, match="mp_linear: x must be a floating-point tensor"):
        ops.mp_linear(torch.ones(2, 3, dtype=torch.int64), torch.randn(4, 3))
