"""A step of the sampler."""

import itertools
from typing import Any

import pytest
import torch
from op_testing import LAYOUTS, assert_accurate
from torch import Tensor

from edm2ext import ops, reference, set_backend

SHAPES = [(3, 4, 8, 8), (2, 3, 5, 7), (1, 1, 1, 1), (2, 8, 3, 9), (0, 4, 3, 3), (2, 3, 0, 3), (7, 6), (5,)]
FORMS = list(itertools.product((False, True), repeat=3))  # with guide, start, noise


def arguments(shape: tuple[int, ...], dtype: torch.dtype, guide: bool, start: bool, noise: bool) -> dict[str, Any]:
    """The result of an Euler step and the state it started from, of magnitudes that a sampler meets."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    names = ("begin", "slope", "denoised", "guide", "noise")
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name in names}
    t_hat, t_next = (torch.tensor(t, dtype=dtype) for t in (1.7, 1.1))
    x = drawn["begin"] + (t_next - t_hat) * drawn["slope"] if start else drawn["begin"]
    chosen: dict[str, Any] = {"x": x, "denoised": drawn["denoised"], "t_hat": t_hat, "t_next": t_next}
    if guide:
        chosen |= {"guide": drawn["guide"], "guidance": 2.2}
    if start:
        chosen |= {"start": drawn["begin"]}
    if noise:
        chosen |= {"noise": drawn["noise"], "churn": 0.3, "S_noise": 1.003}
    return chosen


def converted(chosen: dict[str, Any], change: Any) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in chosen.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_matches_reference(form: tuple[bool, ...], dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        chosen = arguments(shape, dtype, *form)
        chosen |= {"x": LAYOUTS[layout](chosen["x"])}
        with set_backend("native"):
            got, nothing = ops.sampler_step(**chosen)
        assert nothing is None
        assert got.dtype == dtype
        exact = reference.sampler_step(**converted(chosen, Tensor.double))
        assert_accurate(got, reference.sampler_step(**chosen), exact)
        assert got.dim() != 4 or got.is_contiguous(memory_format=reference.memory_format(chosen["x"]))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("network_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_of_the_next_step(
    backend: str, dtype: torch.dtype, network_dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    for shape, form in itertools.product(SHAPES[:6], ((False, False, False), (True, True, True))):
        chosen = arguments(shape, dtype, *form)
        network = ops.NetworkInput(0.4, network_dtype, memory_format)
        out, x_in = ops.sampler_step(**chosen, network=network)
        assert torch.equal(out, ops.sampler_step(**chosen)[0])
        assert x_in is not None
        sigma = chosen["t_next"] * (1 + chosen.get("churn", 0.0))
        expected = ops.precondition_input(out, sigma, *network)
        torch.testing.assert_close(x_in, expected, rtol=2 * torch.finfo(network_dtype).eps, atol=0)
        assert x_in.stride() == expected.stride()
        assert torch.equal(x_in[:, -1:], torch.ones_like(x_in[:, -1:]))


def test_heun_is_second_order() -> None:
    """The mean of two slopes: exact for D linear in x up to the third power of the step."""
    t_hat, t_next = torch.tensor(2.0, dtype=torch.float64), torch.tensor(1.99, dtype=torch.float64)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.25 / (0.25 + t**2)

    euler, _ = ops.sampler_step(x, denoised(x, t_hat), t_hat, t_next)
    heun, _ = ops.sampler_step(euler, denoised(euler, t_next), t_hat, t_next, start=x)
    exact = ((0.25 + t_next**2) / (0.25 + t_hat**2)).sqrt()
    assert abs(euler - exact) > 1e-7
    assert abs(heun - exact) < 1e-7


def test_other_dtypes_and_gradients(backend: str) -> None:
    chosen = arguments((2, 3, 4, 4), torch.float32, True, True, True)
    half = converted(chosen, Tensor.bfloat16)
    assert torch.equal(ops.sampler_step(**half)[0], reference.sampler_step(**half))
    chosen["denoised"].requires_grad_()
    for module in (ops, reference):
        out = module.sampler_step(**chosen)
        out = out[0] if isinstance(out, tuple) else out
        (grad,) = torch.autograd.grad(out.square().sum(), chosen["denoised"])
        assert grad.abs().max() > 0


def test_compiles(backend: str) -> None:
    torch.compiler.reset()
    chosen = arguments((2, 3, 4, 4), torch.float32, True, True, True)
    network = ops.NetworkInput(0.5, torch.bfloat16, torch.channels_last)
    compiled = torch.compile(ops.sampler_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**chosen, network=network), ops.sampler_step(**chosen, network=network))


def test_bad_input(backend: str) -> None:
    x, t = torch.randn(2, 3, 4, 4), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"sampler_step: denoised must have x's shape \[2, 3, 4, 4\], got \[2, 3, 4\]"):
        ops.sampler_step(x, x[..., 0], t, t)
    with pytest.raises(TypeError, match=r"sampler_step: guide must have x's dtype torch.float32, got torch.float64"):
        ops.sampler_step(x, x, t, t, guide=x.double())
    with pytest.raises(ValueError, match=r"sampler_step: t_next must have one element, got shape \[2\]"):
        ops.sampler_step(x, x, t, torch.ones(2))
    with pytest.raises(TypeError, match=r"sampler_step: t_hat must be a tensor, got float"):
        ops.sampler_step(x, x, 1.0, t)
    with pytest.raises(ValueError, match=r"sampler_step: churn must not be negative, got -0.1"):
        ops.sampler_step(x, x, t, t, churn=-0.1)
    with pytest.raises(ValueError, match="sampler_step: x and start must be on one device, got cpu and meta"):
        ops.sampler_step(x, x, t, t, start=x.to("meta"))
