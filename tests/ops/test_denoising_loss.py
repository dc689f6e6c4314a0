"""The training loss and its gradients, of the U-Net's output."""

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, assert_accurate
from torch import Tensor

from edm2ext import ops, reference, set_backend

SHAPES = [(3, 4, 8, 8), (2, 3, 5, 7), (4, 1, 1, 1), (2, 8, 3, 9), (5, 2, 1, 6), (0, 4, 3, 3), (2, 3, 0, 3)]


def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """F, x, y, sigma and u."""
    exact = reference.image_dtype(dtype)
    images = [torch.randn(shape).to(exact) for _ in range(2)]
    sigma = torch.linspace(-2, 2, shape[0]).exp().reshape(-1, 1, 1, 1).to(exact)
    return [torch.randn(shape).to(dtype), *images, sigma, torch.randn_like(sigma)]


@pytest.mark.parametrize("f_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype: torch.dtype, layout: str, f_layout: str) -> None:
    for shape in SHAPES:
        f, x, y, sigma, u = arguments(shape, dtype)
        inputs = LAYOUTS[f_layout](f), LAYOUTS[layout](x), y, sigma, u
        with set_backend("native"):
            got = ops.denoising_loss(*inputs, 0.4, 0.7)
        plain = reference.denoising_loss(*inputs, 0.4, 0.7)
        exact = reference.denoising_loss(*(tensor.double() for tensor in inputs), 0.4, 0.7)
        for out, low, high in zip(got, plain, exact, strict=True):
            assert out.dtype == low.dtype
            assert_accurate(out, low, high)
        assert got[1].is_contiguous(memory_format=reference.memory_format(inputs[0]))
        assert got[2].shape == u.shape


def test_gradients_are_those_of_the_map(backend: str) -> None:
    f, x, y, sigma, u = arguments((2, 3, 4, 5), torch.float64)
    f.requires_grad_(), u.requires_grad_()
    loss, *gradients = ops.denoising_loss(f, x, y, sigma, u, scale=0.3)
    assert not any(t.requires_grad for t in (loss, *gradients))
    expected = reference.denoising_loss_map(f, x, y, sigma, u)
    torch.testing.assert_close(loss, expected.detach().sum(dim=(1, 2, 3)))
    torch.testing.assert_close(gradients, list(torch.autograd.grad(0.3 * expected.sum(), (f, u))))
    assert torch.autograd.gradcheck(lambda f, u: reference.denoising_loss_map(f, x, y, sigma, u), (f, u))


def test_does_not_depend_on_threads() -> None:
    inputs = arguments((7, 5, 63, 65), torch.float32)
    results = []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        with set_backend("native"):
            results.append(ops.denoising_loss(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles(backend: str) -> None:
    torch.compiler.reset()
    inputs = arguments((2, 3, 4, 5), torch.float32)
    compiled = torch.compile(ops.denoising_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), ops.denoising_loss(*inputs))


def test_fp16_on_the_cpu_is_left_to_the_reference(backend: str) -> None:
    f, *others = arguments((2, 3, 4, 5), torch.float32)
    got = ops.denoising_loss(f.half(), *others)
    assert [t.dtype for t in got] == [torch.float32, torch.float16, torch.float32]


def test_bad_input(backend: str) -> None:
    f, x, y, sigma, u = arguments((2, 3, 4, 5), torch.float32)
    with pytest.raises(ValueError, match=r"denoising_loss: y must have x's shape \[2, 3, 4, 5\], got \[1, 3, 4, 5\]"):
        ops.denoising_loss(f, x, y[:1], sigma, u)
    with pytest.raises(ValueError, match=r"denoising_loss: u must have 2 elements, got shape \[1, 1, 1, 1\]"):
        ops.denoising_loss(f, x, y, sigma, u[:1])
    with pytest.raises(ValueError, match="denoising_loss: sigma must have 1 or 2 elements"):
        ops.denoising_loss(f, x, y, torch.ones(3), u)
    with pytest.raises(ValueError, match=r"denoising_loss: sigma_data must be positive, got -1"):
        ops.denoising_loss(f, x, y, sigma, u, -1)
    with pytest.raises(TypeError, match=r"denoising_loss: f must be a floating-point tensor, got torch.int64"):
        ops.denoising_loss(f.long(), x, y, sigma, u)
