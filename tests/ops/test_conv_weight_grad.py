"""The native gradient of a convolution's weight on the CPU, and that mp_conv2d takes it."""

import importlib

import pytest
import torch
from op_testing import LAYOUTS, assert_accurate
from torch import Tensor

from edm2ext import backend, nn, ops, set_backend

module = importlib.import_module("edm2ext.ops.conv_weight_grad")
conv_weight_grad = backend.op("conv_weight_grad")
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.skipif(not module._KERNELS.cpu, reason="no native library")


def by_torch(grad: Tensor, x: Tensor, size: int) -> Tensor:
    w = torch.empty(grad.shape[1], x.shape[1], size, size, dtype=x.dtype)
    ones, pad = [1, 1], [size // 2] * 2
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, ones, pad, ones, False, [0, 0], 1, [False, True, False]
    )[1]


def assert_like_torch(grad: Tensor, x: Tensor, size: int) -> None:
    """As close to the sum in fp64 as torch's in fp32, whatever dtype the summands have."""
    grad_w = conv_weight_grad(grad, x, size)
    assert grad_w.dtype == torch.float32
    exact = by_torch(grad.double(), x.double(), size)
    assert_accurate(grad_w, by_torch(grad.float(), x.float(), size), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("out", [1, 7, 12, 13, 32])
@pytest.mark.parametrize("channels", [8, 40, 56])
def test_shapes(channels: int, out: int, size: int, dtype: torch.dtype) -> None:
    x, grad = (torch.randn(3, n, 7, 5).to(dtype) for n in (channels, out))
    assert_like_torch(grad, x, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 8, 1, 1), (1, 8, 2, 1), (2, 8, 1, 9), (70, 24, 16, 16)])
def test_images(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Smaller than the kernel; more than fit the cache."""
    assert_like_torch(torch.randn(shape[0], 9, *shape[2:]).to(dtype), torch.randn(shape).to(dtype), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_exact(batch: int, dtype: torch.dtype) -> None:
    """Integers: every index and every border, and images without another to pair with."""
    x, grad = (torch.randint(-3, 4, [batch, channels, 5, 6]).to(dtype) for channels in (56, 23))
    assert torch.equal(conv_weight_grad(grad, x, 3), by_torch(grad.double(), x.double(), 3).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(dtype: torch.dtype) -> None:
    """They reach the sums that they are part of, and no other."""
    x, grad = (torch.randint(1, 4, [3, 8, 4, 4]).to(dtype) for _ in range(2))
    x[2, 3, 0, 0], grad[1, 5, 3, 3] = torch.nan, torch.inf
    spoilt = torch.zeros(8, 8, 3, 3, dtype=torch.bool)
    spoilt[:, 3, :2, :2] = spoilt[5, :, :2, :2] = True  # corners of images, beyond which there is nothing
    assert torch.equal(~conv_weight_grad(grad, x, 3).isfinite(), spoilt)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    x, grad = LAYOUTS[layout](torch.randn(2, 8, 5, 6).to(dtype)), torch.randn(1, 7, 1, 1).to(dtype).expand(2, 7, 5, 6)
    expected = conv_weight_grad(grad.contiguous(), x.contiguous(), 3)
    assert torch.equal(conv_weight_grad(grad, x, 3), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_without_pixels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    assert torch.equal(conv_weight_grad(x, x, 3), torch.zeros(8, 8, 3, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_it(dtype: torch.dtype) -> None:
    x, grad = torch.randn(40, 32, 16, 16).to(dtype), torch.randn(40, 32, 16, 16).to(dtype)
    alone = conv_weight_grad(grad, x, 3)
    torch.set_num_threads(3)
    assert torch.equal(conv_weight_grad(grad, x, 3), alone)


NOTHING, EVERYTHING = frozenset(), frozenset(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prepared", [False, True])
def test_mp_conv2d_takes_it(monkeypatch: pytest.MonkeyPatch, prepared: bool, dtype: torch.dtype) -> None:
    """And gives the gradients of x, the weight and the gain that it gives without."""
    x = torch.randn(2, 8, 6, 6).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(7, 8, 3, 3, requires_grad=True)
    gain = 1 if prepared else torch.tensor(0.7, requires_grad=True)
    leaves = (x, w) if prepared else (x, w, gain)
    found = {}
    for faster in (NOTHING, EVERYTHING):
        monkeypatch.setattr(module, "_FASTER", faster)
        y = ops.mp_conv2d(x, w, gain, prepared=prepared)
        assert (y.grad_fn.name() == "_ConvolutionBackward") == bool(faster)
        assert y.is_contiguous(memory_format=torch.channels_last)
        found[faster] = (y.detach(), *torch.autograd.grad(y.square().sum(), leaves))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    torchs = (
        ops.mp_conv2d(x, w, stride=2),
        ops.mp_conv2d(x.contiguous(), w),
        ops.mp_conv2d(x.double(), w),
        ops.mp_conv2d(x, w.detach()),
    )
    assert all(y.grad_fn.name() != "_ConvolutionBackward" for y in torchs)


@pytest.mark.parametrize("gradients", ["raw", "effective"])
def test_layers_take_it(monkeypatch: pytest.MonkeyPatch, gradients: str) -> None:
    """With weights prepared in bfloat16, whose gradients are summed in float32 and not rounded in between."""
    monkeypatch.setattr(module, "_FASTER", EVERYTHING)
    layer = nn.MPConv(16, 8, 3)
    gain = torch.tensor(0.7, requires_grad=gradients == "raw")
    x = torch.randn(3, 16, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    grad = torch.randn(3, 8, 5, 5).bfloat16()
    with nn.PreparedWeights(layer, {layer: gain}, torch.bfloat16, gradients=gradients):
        layer(x, gain).backward(grad)
    expected = conv_weight_grad(grad, x, 3)
    if gradients == "raw":
        expected, grad_gain = torch.ops.edm2.effective_weight_backward(expected, layer.weight, gain, 1.0, 1e-4)
        torch.testing.assert_close(gain.grad, grad_gain)
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("prepared", [False, True])
def test_higher_derivatives(monkeypatch: pytest.MonkeyPatch, prepared: bool) -> None:
    monkeypatch.setattr(module, "_FASTER", EVERYTHING)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(3, 8, 3, 3, requires_grad=True)

    def penalty(backend_name: str) -> tuple[Tensor, ...]:
        with set_backend(backend_name):
            grad_x, grad_w = torch.autograd.grad(
                ops.mp_conv2d(x, w, prepared=prepared).pow(3).sum(), (x, w), create_graph=True
            )
            return torch.autograd.grad(grad_x.square().sum() + grad_w.square().sum(), (x, w))

    for a, b in zip(penalty("native"), penalty("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("isa", "bf16", "faster"),
    [
        ("portable", "", []),
        ("avx2", "avx512_bf16", ["float32"]),
        ("avx512", "", ["float32"]),
        ("avx512", "avx512_bf16", ["bfloat16", "float32"]),
        ("avx512", "amx_bf16", ["float32"]),
    ],
)
def test_where_it_is_faster(isa: str, bf16: str, faster: list[str]) -> None:
    found = module.faster_dtypes({"cpu_isa": isa, "cpu_bf16": bf16})
    assert sorted(str(dtype).removeprefix("torch.") for dtype in found) == faster


@pytest.mark.parametrize(
    ("grad", "x", "size", "message"),
    [
        ((2, 3, 4, 4), (2, 9, 4, 4), 3, "x: expected channels in multiples of 8, got 9"),
        (
            (2, 3, 4, 5),
            (2, 8, 4, 4),
            3,
            r"grad: expected batch, height and width of \[2, 8, 4, 4\], got \[2, 3, 4, 5\]",
        ),
        ((2, 3, 4, 4), (2, 8, 4, 4), 2, "kernel_size: expected an odd number, got 2"),
        ((2, 3), (2, 8), 3, r"x and grad: expected \[batch, channels, height, width\], got \[2, 8\]"),
    ],
)
def test_bad_input(grad: tuple[int, ...], x: tuple[int, ...], size: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"conv_weight_grad: {message}"):
        conv_weight_grad(torch.randn(grad), torch.randn(x), size)
    with pytest.raises(RuntimeError, match="x: expected dtype Float or BFloat16, got Double"):
        conv_weight_grad(torch.randn(1, 8, 2, 2).double(), torch.randn(1, 8, 2, 2).double(), 3)
