"""The native gradient of a convolution's weight on the CPU, and that mp_conv2d takes it."""

import importlib

import pytest
import torch
from op_testing import LAYOUTS, assert_accurate
from torch import Tensor

from edm2ext import backend, ops, set_backend

module = importlib.import_module("edm2ext.ops.mp_conv2d")
conv_weight_grad = backend.op("conv_weight_grad")
pytestmark = pytest.mark.skipif(not module._KERNELS.cpu, reason="no native library")


def by_torch(grad: Tensor, x: Tensor, size: int) -> Tensor:
    w = torch.empty(grad.shape[1], x.shape[1], size, size, dtype=x.dtype)
    ones, pad = [1, 1], [size // 2] * 2
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, ones, pad, ones, False, [0, 0], 1, [False, True, False]
    )[1]


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("out", [1, 5, 6, 7, 12, 13, 32])
@pytest.mark.parametrize("channels", [8, 16, 40])
def test_shapes(channels: int, out: int, size: int) -> None:
    x, grad = torch.randn(3, channels, 7, 5), torch.randn(3, out, 7, 5)
    exact = by_torch(grad.double(), x.double(), size)
    assert_accurate(conv_weight_grad(grad, x, size), by_torch(grad, x, size), exact)


@pytest.mark.parametrize("shape", [(5, 8, 1, 1), (1, 8, 2, 1), (2, 8, 1, 9), (70, 24, 16, 16)])
def test_images(shape: tuple[int, ...]) -> None:
    """Smaller than the kernel; more than fit the cache."""
    x, grad = torch.randn(shape), torch.randn(shape[0], 9, *shape[2:])
    exact = by_torch(grad.double(), x.double(), 3)
    assert_accurate(conv_weight_grad(grad, x, 3), by_torch(grad, x, 3), exact)


def test_exact() -> None:
    """Integers: every index and every border."""
    x, grad = (torch.randint(-3, 4, [4, channels, 5, 6]).float() for channels in (24, 11))
    assert torch.equal(conv_weight_grad(grad, x, 3), by_torch(grad.double(), x.double(), 3).float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    x, grad = LAYOUTS[layout](torch.randn(2, 8, 5, 6)), torch.randn(1, 7, 1, 1).expand(2, 7, 5, 6)
    expected = conv_weight_grad(grad.contiguous(), x.contiguous(), 3)
    assert torch.equal(conv_weight_grad(grad, x, 3), expected)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_without_pixels(shape: tuple[int, ...]) -> None:
    assert torch.equal(conv_weight_grad(torch.randn(shape), torch.randn(shape), 3), torch.zeros(8, 8, 3, 3))


def test_threads_do_not_change_it() -> None:
    x, grad = torch.randn(40, 32, 16, 16), torch.randn(40, 32, 16, 16)
    alone = conv_weight_grad(grad, x, 3)
    torch.set_num_threads(3)
    assert torch.equal(conv_weight_grad(grad, x, 3), alone)


@pytest.mark.parametrize("prepared", [False, True])
def test_mp_conv2d_takes_it(monkeypatch: pytest.MonkeyPatch, prepared: bool) -> None:
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(7, 8, 3, 3, requires_grad=True)
    found = {}
    for faster in (False, True):
        monkeypatch.setattr(module, "_FASTER", faster)
        y = ops.mp_conv2d(x, w, prepared=prepared)
        assert ("_Conv" in y.grad_fn.name()) == faster
        found[faster] = (y.detach(), *torch.autograd.grad(y.square().sum(), (x, w)))
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert all(
        y.is_contiguous(memory_format=torch.channels_last) and g.stride() == x.stride() for y, g, _ in found.values()
    )
    assert "_Conv" not in ops.mp_conv2d(x, w, stride=2).grad_fn.name()
    assert "_Conv" not in ops.mp_conv2d(x.contiguous(), w).grad_fn.name()
    assert "_Conv" not in ops.mp_conv2d(x.double(), w).grad_fn.name()


def test_higher_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FASTER", True)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(3, 8, 3, 3, requires_grad=True)

    def penalty(backend_name: str) -> tuple[Tensor, ...]:
        with set_backend(backend_name):
            grad_x, grad_w = torch.autograd.grad(
                ops.mp_conv2d(x, w, prepared=True).pow(3).sum(), (x, w), create_graph=True
            )
            return torch.autograd.grad(grad_x.square().sum() + grad_w.square().sum(), (x, w))

    for a, b in zip(penalty("native"), penalty("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


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
    with pytest.raises(RuntimeError, match="x: expected dtype Float, got Double"):
        conv_weight_grad(torch.randn(1, 8, 2, 2).double(), torch.randn(1, 8, 2, 2).double(), 3)
