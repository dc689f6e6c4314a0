"""The CUDA half of the torch layer on emulated kernels (the fixture `ops`): ops on activations, layouts, gradients."""

import math
from functools import partial
from types import SimpleNamespace

import emulated
import pytest
import torch
from layouts import EPS, LAYOUT_PAIRS, LAYOUTS, SHAPES, check, strided
from torch import Tensor

from edm2ext import reference


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixel_norm(ops: SimpleNamespace, shape: tuple[int, ...], layout: str, grad_layout: str):
    x = emulated.random_tensor(*shape, dtype=torch.float32)
    check(
        lambda x: ops.pixel_norm(x, EPS),
        lambda g, x: ops.pixel_norm_backward(g, x, EPS),
        lambda x: reference.pixel_norm(x, EPS),
        [x],
        layout,
        grad_layout,
    )
    check(
        lambda x: ops.pixel_norm_silu(x, EPS),
        lambda g, s, x: ops.pixel_norm_silu_backward(g, s, x, EPS),
        lambda x: reference.pixel_norm(x, EPS, silu=True),
        [x],
        layout,
        grad_layout,
    )


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mp_silu(ops: SimpleNamespace, shape: tuple[int, ...], layout: str, grad_layout: str):
    x = emulated.random_tensor(*shape, dtype=torch.float32)
    check(ops.mp_silu, ops.mp_silu_backward, reference.mp_silu, [x], layout, grad_layout)
    for c in (torch.randn(shape[1], shape[0]).t(), torch.full((1, 1), 0.7).expand(shape[:2])):
        modulated = [x, c]
        check(
            ops.mp_silu_modulated,
            ops.mp_silu_modulated_backward,
            reference.mp_silu_modulated,
            modulated,
            layout,
            grad_layout,
        )


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout(ops: SimpleNamespace, shape: tuple[int, ...], layout: str, grad_layout: str):
    dropout = (torch.tensor([1, 9, 2, 9])[::2], 7, 20_000)
    check(
        lambda x, c: ops.mp_silu_modulated_dropout(x, c, *dropout),
        lambda g, x, c: ops.mp_silu_modulated_dropout_backward(g, x, c, *dropout),
        lambda x, c: reference.mp_silu_modulated(x, c, 20_000 / 2**16, *dropout[:2]),
        [emulated.random_tensor(*shape, dtype=torch.float32), torch.randn(shape[:2])],
        layout,
        grad_layout,
    )


def test_modulated_backward_over_several_chunks(ops: SimpleNamespace):
    x = emulated.random_tensor(2, 8, 65, 65, dtype=torch.float32)
    for layout in ("contiguous", "channels_last"):
        inputs = [x, emulated.random_tensor(2, 8, dtype=torch.float32, seed=1)]
        check(
            ops.mp_silu_modulated, ops.mp_silu_modulated_backward, reference.mp_silu_modulated, inputs, layout, layout
        )


def test_modulated_without_pixels(ops: SimpleNamespace):
    x, c = torch.ones(2, 3, 0), torch.ones(2, 3)
    assert ops.mp_silu_modulated(x, c).shape == x.shape
    assert torch.equal(ops.mp_silu_modulated_backward(x, x, c)[1], torch.zeros(2, 3))


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mp_sum(ops: SimpleNamespace, shape: tuple[int, ...], layout: str, grad_layout: str):
    inputs = [emulated.random_tensor(*shape, dtype=torch.float32, seed=i) for i in range(2)]

    def backward(g: Tensor, a: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same whether there is one user, or the gradient comes in halves from two."""
        channels_last = reference.memory_format(a) != torch.contiguous_format
        grads = ops.mp_sum_backward(g, None, mask, 0.3, channels_last)
        halves = ops.mp_sum_backward(g / 2, g / 2, mask, 0.3, channels_last)
        assert all(torch.equal(grad, half) for grad, half in zip(grads, halves, strict=True))
        return grads

    check(
        lambda a, b: ops.mp_sum(a, b, 0.3, math.inf),
        lambda g, a, b: backward(g, a, None),
        lambda a, b: reference.mp_sum(a, b, 0.3),
        inputs,
        layout,
        grad_layout,
    )
    check(
        lambda a, b: ops.mp_sum_clipped(a, b, 0.3, 0.9)[0],
        lambda g, a, b: backward(g, a, ops.mp_sum_clipped(a, b, 0.3, 0.9)[1]),
        lambda a, b: reference.mp_sum(a, b, 0.3, 0.9),
        inputs,
        layout,
        grad_layout,
    )


def test_mp_sum_of_any_dimension(ops: SimpleNamespace):
    for shape in ((), (7,), (2, 3, 4, 5, 2, 2)):
        a, b = torch.randn(shape), torch.randn(shape)
        y, mask = ops.mp_sum_clipped(a, b, 0.3, 1.0)
        torch.testing.assert_close(y, reference.mp_sum(a, b, 0.3, 1.0))
        assert torch.equal(ops.mp_sum(a, b, 0.3, 1.0), y)
        assert mask.shape == ((a.numel() + 7) // 8,)


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mp_cat(ops: SimpleNamespace, shape: tuple[int, ...], layout: str, grad_layout: str):
    a = emulated.random_tensor(*shape, dtype=torch.float32)
    for channels_b in (shape[1], 5):
        b = emulated.random_tensor(shape[0], channels_b, *shape[2:], dtype=torch.float32, seed=1)
        check(
            lambda a, b: ops.mp_cat(a, b, 0.3),
            lambda g, a, b: ops.mp_cat_backward(g, a.shape[1], 0.3),
            lambda a, b: reference.mp_cat(a, b, 0.3),
            [a, b],
            layout,
            layout,  # the gradients have the format of the gradient
        )
        check(
            lambda a, b: ops.mp_cat_silu(a, b, 0.3),
            lambda g, s, a, b: ops.mp_cat_silu_backward(g, s, ops.mp_cat(a, b, 0.3), a.shape[1], 0.3),
            lambda a, b: reference.mp_cat(a, b, 0.3, silu=True),
            [a, b],
            layout,
            grad_layout,
        )
        check(
            lambda a, b: (ops.mp_cat(a, b, 0.3), ops.mp_cat_silu_only(a, b, 0.3)),
            lambda g, s, a, b: ops.mp_cat_silu_only_backward(g, s, a, b, 0.3),
            lambda a, b: reference.mp_cat(a, b, 0.3, silu=True),
            [a, b],
            layout,
            grad_layout,
        )


def test_mp_cat_backward_of_an_expanded_gradient(ops: SimpleNamespace):
    grad = torch.ones(1, 1, 1).expand(2, 5, 3)
    for grad_x, scale in zip(ops.mp_cat_backward(grad, 2, 0.5), reference.cat_scales(2, 3, 0.5), strict=True):
        torch.testing.assert_close(grad_x, torch.full_like(grad_x, scale))


@pytest.mark.parametrize("grad_layout", ["contiguous", "expanded", "strided"])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "misaligned"])
@pytest.mark.parametrize(("batch", "channels"), [(4, 9), (1, 40), (0, 3), (3, 0)])
def test_mp_fourier(ops: SimpleNamespace, batch: int, channels: int, layout: str, grad_layout: str):
    x, freqs, phases = (emulated.random_tensor(n, dtype=torch.float32, seed=n) for n in (batch, channels, channels))
    leaves = [t.double().requires_grad_() for t in (x, freqs, phases)]
    expected = reference.mp_fourier(*leaves)
    inputs = [LAYOUTS[layout](t) for t in (x, freqs, phases)]
    y = ops.mp_fourier(*inputs)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    if grad_layout == "expanded":
        grad = torch.full((1, 1), 0.5).expand(batch, channels)
    else:
        grad = LAYOUTS[grad_layout](emulated.random_tensor(batch, channels, dtype=torch.float32))
    found = ops.mp_fourier_backward(grad, *inputs)
    for got, truth in zip(found, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)


def test_mp_fourier_buffers_of_another_dtype(ops: SimpleNamespace):
    """Snapshots hold them in fp16; computed with in fp32, their gradients come back in fp16."""
    x, freqs, phases = torch.randn(3), torch.randn(4).half(), torch.randn(4).half()
    torch.testing.assert_close(ops.mp_fourier(x, freqs, phases), reference.mp_fourier(x, freqs, phases))
    grads = ops.mp_fourier_backward(torch.ones(3, 4), x, freqs, phases)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float16, torch.float16]


@pytest.mark.parametrize("compensated", [False, True])
def test_accumulate_snapshots(ops: SimpleNamespace, compensated: bool):
    x = emulated.random_tensor(4, 6, dtype=torch.float32)
    inputs = [x, x.half() + 1, strided(x + 2), x.bfloat16().t().contiguous().t()]
    coefs = emulated.random_tensor(3, 4, dtype=torch.float64, seed=1).t()
    start = emulated.random_tensor(3, 4, 6, dtype=torch.float32, seed=2)
    expected = reference.accumulate_snapshots(inputs, coefs, start.clone())
    for out in (start.clone(), torch.cat([start, start], dim=2)[..., :6], torch.cat([start, start], dim=1)[:, :4]):
        ops.accumulate_snapshots_(out, inputs, coefs, compensated)
        torch.testing.assert_close(out, expected)
    scalars = [torch.tensor(2.0), torch.tensor(3.0)]
    out = torch.zeros(1)
    ops.accumulate_snapshots_(out, scalars, torch.tensor([[1.0], [-1.0]], dtype=torch.float64), compensated)
    assert torch.equal(out, torch.tensor([-1.0]))


def test_two_dimensions(ops: SimpleNamespace):
    x = emulated.random_tensor(5, 24, dtype=torch.float16)
    torch.testing.assert_close(ops.pixel_norm(x, EPS), reference.pixel_norm(x, EPS), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("filter", [[1.0, 1.0], [1.0, 3.0, 3.0, 1.0]])
@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (1, 3, 5, 7), (0, 4, 2, 2)], ids=str)
def test_resample(ops: SimpleNamespace, shape: tuple[int, ...], filter: list[float], layout: str, grad_layout: str):
    x = LAYOUTS[layout](emulated.random_tensor(*shape, dtype=torch.float32))
    for function, op, backward in (
        (reference.resample_down, ops.resample_down, lambda g: ops.resample_down_backward(g, filter, *shape[2:])),
        (reference.resample_up, ops.resample_up, lambda g: ops.resample_up_backward(g, filter)),
    ):
        leaf = x.double().requires_grad_()
        expected = function(leaf, filter)
        out = op(x, filter)
        torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-4, atol=1e-5)
        assert out.is_contiguous(memory_format=reference.memory_format(x))
        if grad_layout == "expanded":
            grad = torch.full((1, 1, 1, 1), 0.5).expand(out.shape)
        else:
            grad = LAYOUTS[grad_layout](emulated.random_tensor(*out.shape, dtype=torch.float32, seed=1))
        (truth,) = torch.autograd.grad(expected, leaf, grad.double())
        torch.testing.assert_close(backward(grad).double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("f_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (1, 3, 5, 7), (2, 1, 3, 3), (0, 4, 2, 2)], ids=str)
def test_noisy_images(ops: SimpleNamespace, shape: tuple[int, ...], layout: str, f_layout: str):
    """Preconditioning, the loss and the sampler's step."""
    x, y, noise = (LAYOUTS[layout](emulated.random_tensor(*shape, dtype=torch.float32, seed=i)) for i in range(3))
    f = LAYOUTS[f_layout](emulated.random_tensor(*shape, dtype=torch.float16, seed=3))
    sigma, u = torch.linspace(0.3, 3, shape[0]), torch.linspace(-1, 1, shape[0])
    if shape[0] == 0:
        sigma = torch.ones(1)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
    kept, f_kept = reference.memory_format(x), reference.memory_format(f)

    for memory_format in (torch.contiguous_format, torch.channels_last):
        arguments = x, sigma, 0.4, torch.float16
        x_in = ops.precondition_input(*arguments, memory_format == torch.channels_last)
        close(x_in, reference.precondition_input(*arguments, memory_format))
        assert x_in.is_contiguous(memory_format=memory_format) or x_in.numel() == 0
    denoised = ops.precondition_output(x, f, sigma, 0.4)
    close(denoised, reference.precondition_output(x, f, sigma, 0.4))
    assert denoised.is_contiguous(memory_format=kept)
    grad_f = ops.precondition_output_backward(y, sigma, 0.4, torch.float16, f_kept == torch.channels_last)
    c_out = reference.precondition_output(torch.zeros_like(x), torch.ones_like(f), sigma, 0.4)
    close(grad_f, (c_out * y).half())
    assert grad_f.is_contiguous(memory_format=f_kept)

    levels = sigma[: shape[0]]
    got = ops.denoising_loss(f, x, y, levels, u, 0.4, 0.5)
    for out, truth in zip(got, reference.denoising_loss(f, x, y, levels, u, 0.4, 0.5), strict=True):
        close(out, truth)
    assert got[1].is_contiguous(memory_format=f_kept)

    t_hat, t_next = torch.tensor(1.7), torch.tensor(1.1)
    noise_scale = 1.1 * (1.2**2 - 1) ** 0.5
    step = (denoised, y, 2.0, noise, t_hat, t_next, noise, noise_scale)
    options = {"guide": y, "guidance": 2.0, "start": noise, "noise": noise, "churn": 0.2, "S_noise": 1.1}
    expected = reference.sampler_step(x, denoised, t_hat, t_next, **options)
    out = ops.sampler_step(x, *step)
    close(out, expected)
    assert out.is_contiguous(memory_format=kept)
    again, x_in = ops.sampler_step_input(x, *step, 0.2, 0.4, torch.float16, True)
    assert torch.equal(again, out)
    close(x_in, reference.precondition_input(out, t_next * 1.2, 0.4, torch.float16, torch.channels_last))


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (1, 3, 5, 7), (0, 4, 2, 2)], ids=str)
def test_resample_down_pixel_norm(ops: SimpleNamespace, shape: tuple[int, ...], layout: str, grad_layout: str):
    x = LAYOUTS[layout](emulated.random_tensor(*shape, dtype=torch.float32))
    leaf = x.double().requires_grad_()
    expected = reference.resample_down_pixel_norm(leaf)
    *found, rms = ops.resample_down_pixel_norm(x, EPS)
    for out, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(out.double(), truth.detach(), rtol=1e-4, atol=1e-5)
        assert out.is_contiguous(memory_format=reference.memory_format(x))
    if grad_layout == "expanded":
        grads = [torch.full((1, 1, 1, 1), 0.5 + i).expand(out.shape) for i, out in enumerate(found)]
    else:
        grads = [LAYOUTS[grad_layout](emulated.random_tensor(*out.shape, dtype=torch.float32)) for out in found]
    grad = ops.resample_down_pixel_norm_backward(*grads, found[0], rms, EPS, *shape[2:])
    (truth,) = torch.autograd.grad(expected, leaf, [g.double() for g in grads])
    torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-5)
    assert grad.is_contiguous(memory_format=reference.memory_format(x))


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("shape", [(2, 48, 2, 4), (1, 18, 5, 3), (2, 12, 2, 1, 3), (0, 12, 2, 2)], ids=str)
def test_qkv_norm(ops: SimpleNamespace, shape: tuple[int, ...], layout: str, grad_layout: str):
    x = LAYOUTS[layout](emulated.random_tensor(*shape, dtype=torch.float32))
    n, heads, d, pixels = shape[0], 2, shape[1] // 6, x.shape[2:].numel()
    leaf = x.double().requires_grad_()
    parts = leaf.reshape(n, heads, d, 3, pixels).permute(3, 0, 1, 4, 2)
    expected = parts / (EPS + parts.square().mean(-1, keepdim=True).sqrt())
    found = ops.qkv_norm(x, heads, EPS)
    for out, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(out.double(), truth.detach(), rtol=1e-4, atol=1e-5)
        assert out.transpose(1, 2).is_contiguous()
    if grad_layout == "expanded":
        grads = [torch.full((1, 1, 1, 1), 0.5 + j).expand(truth.shape) for j, truth in enumerate(expected)]
    else:
        grads = [LAYOUTS[grad_layout](emulated.random_tensor(*truth.shape, dtype=torch.float32)) for truth in expected]
    grad = ops.qkv_norm_backward(*grads, x, heads, EPS)
    (truth,) = torch.autograd.grad(expected, leaf, torch.stack(grads).double())
    torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-5)
    assert grad.is_contiguous(memory_format=reference.memory_format(x))
