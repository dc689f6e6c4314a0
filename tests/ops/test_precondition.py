"""Preconditioning: the network's input with its constant channel, and the denoiser made of the network's output."""

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, assert_accurate
from torch import Tensor

from edm2ext import ops, reference, set_backend

SHAPES = [(3, 4, 8, 8), (2, 3, 5, 7), (1, 1, 1, 1), (2, 8, 3, 9), (5, 2, 1, 6), (0, 4, 3, 3), (2, 3, 0, 3)]
FORMATS = [torch.contiguous_format, torch.channels_last]


def sigmas(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-3, 3, count).exp().to(dtype)


def levels(shape: tuple[int, ...]) -> list[Tensor]:
    return [sigmas(1)] if shape[0] == 0 else [sigmas(1)[0], sigmas(shape[0]).reshape(-1, 1, 1, 1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_input(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(shape).to(reference.image_dtype(dtype)))
    for sigma in levels(shape):
        for memory_format in FORMATS:
            arguments = x, sigma, 0.4, dtype, memory_format
            with set_backend("native"):
                got = ops.precondition_input(*arguments)
            plain = reference.precondition_input(*arguments)
            exact = reference.precondition_input(x.double(), sigma.double(), 0.4)
            assert got.dtype == plain.dtype == dtype
            assert got.is_contiguous(memory_format=memory_format) or got.numel() == 0
            assert_accurate(got, plain, exact)
            assert torch.equal(got[:, -1:], torch.ones_like(got[:, :1]))


@pytest.mark.parametrize("expanded_grad", [False, True])
@pytest.mark.parametrize("f_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output(dtype: torch.dtype, layout: str, f_layout: str, expanded_grad: bool) -> None:
    for shape in SHAPES:
        f = LAYOUTS[f_layout](torch.randn(shape).to(dtype))
        x = LAYOUTS[layout](torch.randn(shape).to(reference.image_dtype(dtype)))
        grad = torch.randn([1] * 4 if expanded_grad else shape, dtype=x.dtype).expand(shape)
        for sigma in levels(shape):
            with set_backend("native"):
                got = output_and_gradient(ops, x, f, sigma, grad)
            plain = output_and_gradient(reference, x, f, sigma, grad)
            exact = output_and_gradient(reference, x.double(), f.double(), sigma.double(), grad.double())
            for out, low, high in zip(got, plain, exact, strict=True):
                assert out.dtype == low.dtype
                assert_accurate(out, low, high)
            assert got[0].is_contiguous(memory_format=reference.memory_format(x))
            assert got[1].is_contiguous(memory_format=reference.memory_format(f))


def output_and_gradient(module: object, x: Tensor, f: Tensor, sigma: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    f = f.detach().requires_grad_()
    out = module.precondition_output(x, f, sigma, 0.4)  # type: ignore[attr-defined]
    return out.detach(), *torch.autograd.grad(out, f, grad)


@pytest.mark.parametrize(
    ("sigma", "c_skip", "c_out", "c_in"),
    [
        (0.002, 0.999984, 0.001999984, 1.999984),
        (0.5, 0.5, 0.35355339, 1.4142136),
        (80.0, 3.9060974e-5, 0.49999023, 0.012499756),
    ],
)
def test_coefficients(backend: str, sigma: float, c_skip: float, c_out: float, c_in: float) -> None:
    """Spec 12.3."""
    one, level = torch.ones(1, 1, 1, 1), torch.tensor(sigma)
    assert ops.precondition_input(one, level).flatten().tolist() == pytest.approx([c_in, 1], rel=1e-6)
    assert ops.precondition_output(one, 0 * one, level).item() == pytest.approx(c_skip, rel=1e-6)
    assert ops.precondition_output(0 * one, one, level).item() == pytest.approx(c_out, rel=1e-6)


def test_gradients_of_images_and_levels(backend: str) -> None:
    x, f, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), sigmas(2)
    for wanted in ([x], [sigma], [x, sigma]):
        for tensor in wanted:
            tensor.requires_grad_()
        for function, arguments in ((ops.precondition_input, (x, sigma)), (ops.precondition_output, (x, f, sigma))):
            got = torch.autograd.grad(function(*arguments).square().sum(), wanted)
            plain = getattr(reference, function.__name__)
            torch.testing.assert_close(got, torch.autograd.grad(plain(*arguments).square().sum(), wanted))
        for tensor in wanted:
            tensor.requires_grad_(False)


def test_half_images_become_single(backend: str) -> None:
    x = torch.randn(1, 2, 3, 3).bfloat16()
    assert torch.equal(
        ops.precondition_input(x, sigmas(1), dtype=torch.float32)[:, :2],
        ops.precondition_input(x.float(), sigmas(1))[:, :2],
    )
    assert ops.precondition_output(x, x, sigmas(1)).dtype == torch.float32


def test_fp16_on_the_cpu_is_left_to_the_reference(backend: str) -> None:
    x = torch.randn(2, 3, 4, 4)
    arguments = x, sigmas(2), 0.5, torch.float16, torch.channels_last
    assert torch.equal(ops.precondition_input(*arguments), reference.precondition_input(*arguments))
    assert ops.precondition_output(x, x.half(), sigmas(2)).dtype == torch.float32


def test_bad_input(backend: str) -> None:
    x, sigma = torch.randn(2, 3, 4, 4), torch.ones(2)
    with pytest.raises(ValueError, match=r"precondition_input: x must be \[batch, channels, height, width\]"):
        ops.precondition_input(x[0], sigma)
    with pytest.raises(ValueError, match=r"precondition_input: sigma must have 1 or 2 elements, got shape \[3\]"):
        ops.precondition_input(x, torch.ones(3))
    with pytest.raises(TypeError, match="precondition_input: sigma must be a tensor, got float"):
        ops.precondition_input(x, 1.0)
    with pytest.raises(ValueError, match="precondition_input: sigma_data must be positive, got 0"):
        ops.precondition_input(x, sigma, 0)
    with pytest.raises(TypeError, match=r"precondition_input: dtype must be a floating-point type, got torch.int64"):
        ops.precondition_input(x, sigma, dtype=torch.int64)
    with pytest.raises(
        ValueError, match="precondition_input: memory_format must be contiguous_format or channels_last"
    ):
        ops.precondition_input(x, sigma, memory_format=torch.preserve_format)
    with pytest.raises(
        ValueError, match=r"precondition_output: f must have x's shape \[2, 3, 4, 4\], got \[2, 3, 4, 2\]"
    ):
        ops.precondition_output(x, x[..., :2], sigma)
    with pytest.raises(ValueError, match="precondition_output: x and f must be on one device, got cpu and meta"):
        ops.precondition_output(x, x.to("meta"), sigma)
