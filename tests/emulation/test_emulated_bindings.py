"""The CUDA half of the torch layer, registered for CPU tensors on emulated kernels: layouts, gradients, errors."""

import importlib
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import emulated
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edm2ext import reference, set_backend
from edm2ext.ops import ModulatedSiLU, SumWith

EPS = 1e-4


@pytest.fixture(scope="module")
def ops() -> SimpleNamespace:
    """torch.ops.edm2_emulated. Loaded once per process: a library cannot be registered twice."""
    kernels = ["pixel_norm", "mp_silu", "mp_sum", "mp_cat", "mp_fourier", "resample", "resample_down_pixel_norm"]
    kernels += [
        "cosine_attention",
        "ema_update",
        "adam_step",
        "accumulate_snapshots",
        "precondition",
        "denoising_loss",
        "sampler_step",
        "mp_conv2d",
    ]  # adam_step has normalize_weight
    torch.ops.load_library(emulated.build("bindings", *kernels))
    return torch.ops.edm2_emulated


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": _channels_last,
    "strided": _strided,
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
}
SHAPES = [(2, 24, 3, 5), (2, 3, 2, 4, 3), (3, 16, 1, 1), (0, 4, 2, 2)]


def check(
    op: Callable[..., object],
    backward: Callable[..., object],
    plain: Callable[..., object],
    inputs: list[Tensor],
    layout: str,
    grad_layout: str,
) -> None:
    """Outputs and gradients of an op against autograd through plain torch in float64."""
    x = LAYOUTS[layout](inputs[0])
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    expected = plain(*leaves)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    outputs = op(x, *inputs[1:])
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    kept = reference.memory_format(x)
    for out, truth in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out.double(), truth.detach(), rtol=1e-4, atol=1e-5)
        assert out.is_contiguous(memory_format=kept)
    if grad_layout == "expanded":
        grads = [torch.full((1,) * x.dim(), 0.5 + i).expand(out.shape) for i, out in enumerate(outputs)]
    else:
        grads = [LAYOUTS[grad_layout](emulated.random_tensor(*out.shape, dtype=x.dtype)) for out in outputs]
    found = backward(*grads, x, *inputs[1:])
    found = [found] if isinstance(found, Tensor) else list(found)
    truths = torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    for grad, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-5)
    assert found[0].is_contiguous(memory_format=kept)


LAYOUT_PAIRS = [(layout, "expanded") for layout in LAYOUTS] + [
    ("channels_last", "contiguous"),
    ("contiguous", "channels_last"),
    ("contiguous", "strided"),
]


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


# ---- convolution ----


def conv_operands(dtype: torch.dtype = torch.bfloat16, kernel: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and a gradient of y."""
    shapes = (2, 16, 5, 6), (8, 16, kernel, kernel), (2, 8, 5, 6)
    x, w, g = (emulated.random_tensor(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    return _channels_last(x), w, g


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_mp_conv2d(ops: SimpleNamespace, kernel: int, layout: str):
    x, w, g = conv_operands(kernel=kernel)
    xd, wd = (LAYOUTS[layout](t).double().requires_grad_() for t in (x, w))
    exact = F.conv2d(xd, wd, padding=kernel // 2)
    exact.backward(g.double())
    for plan in ([], [3, 2 if kernel == 3 else 1]):
        y = ops.mp_conv2d(LAYOUTS[layout](x), LAYOUTS[layout](w), None, plan)
        grad_x = ops.mp_conv2d_backward_input(LAYOUTS[layout](g), LAYOUTS[layout](w), plan)
        grad_w = ops.mp_conv2d_backward_weight(LAYOUTS[layout](g), LAYOUTS[layout](x), kernel, kernel, plan)
        half = ops.mp_conv2d(x, w, torch.tensor(0.5), plan)
        assert y.dtype == grad_x.dtype == torch.bfloat16
        assert grad_w.dtype == torch.float32
        for out in (y, grad_x, grad_w):
            assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), exact.detach(), rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(half.double(), exact.detach() / 2, rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(grad_x.double(), xd.grad, rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(grad_w.double(), wd.grad, rtol=1e-5, atol=1e-4)


def test_expanded_gradient_of_mp_conv2d(ops: SimpleNamespace):
    x, w, _ = conv_operands()
    ones = torch.ones(1, 1, 1, 1, dtype=x.dtype).expand(2, 8, 5, 6)
    assert torch.equal(ops.mp_conv2d_backward_input(ones, w, []), ops.mp_conv2d_backward_input(ones.clone(), w, []))
    first, second = (ops.mp_conv2d_backward_weight(t, x, 3, 3, []) for t in (ones, ones.clone()))
    assert torch.equal(first, second)


@pytest.mark.parametrize("keep", [False, True])
def test_fused_convolutions(ops: SimpleNamespace, keep: bool):
    """The results are those of separate kernels, bit for bit."""
    x, w, skip = conv_operands()
    c = torch.randn(8, 2).to(x.dtype).t()
    y = ops.mp_conv2d(x, w, None, [])
    silu = ops.mp_silu_modulated(y, c)
    summed = ops.mp_sum(_channels_last(skip), y, 0.3, 1.0)
    fused = [ops.mp_conv2d_silu_modulated(x, w, c, keep, []), ops.mp_conv2d_sum(x, w, skip, 0.3, 1.0, keep, [])]
    for (out, kept), separate in zip(fused, (silu, summed), strict=True):
        assert torch.equal(out, separate)
        assert torch.equal(kept, y) if keep else kept.shape == (0,)


@pytest.fixture
def convolve(ops: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """edm2ext.ops.mp_conv2d.convolve on the emulated kernels."""
    module = importlib.import_module("edm2ext.ops.mp_conv2d")
    for name in ("", "_backward_input", "_backward_weight", "_silu_modulated", "_sum"):
        monkeypatch.setattr(module, f"_mp_conv2d{name}", getattr(ops, f"mp_conv2d{name}"))
    for name in ("mp_silu_modulated_backward", "mp_sum_backward"):
        monkeypatch.setattr(module, f"_{name}", getattr(ops, name))
    return module.convolve


def test_gradient_of_the_raw_weight(convolve: Callable[..., Tensor]):
    """Against float64, through weight normalisation; the weight's gradient was never rounded to 16 bits."""
    x, w, g = conv_operands()
    w, gain = w.float().requires_grad_(), torch.tensor(0.7, requires_grad=True)
    x.requires_grad_()
    kernel = reference.effective_weight(w, gain, x.dtype)
    y = convolve(x, w, kernel, gain, "raw")
    grads = torch.autograd.grad(y, (x, w, gain), g)
    leaves = [t.detach().double().requires_grad_() for t in (x, w, gain)]
    exact = F.conv2d(leaves[0], reference.effective_weight(*leaves[1:]), padding=1)
    truths = torch.autograd.grad(exact, leaves, g.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=0.02)
    torch.testing.assert_close(grads[0].double(), truths[0], rtol=2**-6, atol=0.02)
    for grad, truth in zip(grads[1:], truths[1:], strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-4)
    assert convolve(x.detach(), w.detach(), kernel, 0.7, "raw").equal(y)


def test_gradient_of_the_effective_weight(convolve: Callable[..., Tensor], ops: SimpleNamespace):
    x, kernel, g = conv_operands()
    w = torch.zeros(kernel.shape, requires_grad=True)
    (grad_w,) = torch.autograd.grad(convolve(x, w, kernel, 1.0, "effective"), w, g)
    assert torch.equal(grad_w, ops.mp_conv2d_backward_weight(g, x, 3, 3, []))
    assert grad_w.is_contiguous()
    kernel.requires_grad_()
    (grad,) = torch.autograd.grad(convolve(x, kernel, kernel, 1.0, "effective"), kernel, g)
    assert torch.equal(grad, grad_w.to(kernel.dtype))


THEN = {
    "silu": lambda other: ModulatedSiLU(other[:, :, 0, 0]),
    "sum": lambda other: SumWith(other, 0.3),
    "clipped sum": lambda other: SumWith(other, 0.5, 1.0),
}


@pytest.mark.parametrize("then", THEN)
def test_gradients_through_what_follows(convolve: Callable[..., Tensor], then: str):
    """The same bits as the convolution and what follows one after the other."""
    x, kernel, g = conv_operands()
    other = emulated.random_tensor(2, 8, 5, 6, dtype=x.dtype, seed=7).contiguous(memory_format=torch.channels_last)
    leaves = [t.detach().requires_grad_() for t in (x, kernel.float(), other)]
    x, w, other = leaves
    follow = THEN[then](other)
    fused = convolve(x, w, kernel, 1.0, "effective", follow)
    y = convolve(x, w, kernel, 1.0, "effective")
    with set_backend("reference"):
        separate = follow(y)
    torch.testing.assert_close(fused, separate, rtol=2**-6, atol=0.02)
    assert torch.equal(convolve(*leaves[:1], w.detach(), kernel, 1.0, "effective", follow).detach(), fused)
    with torch.no_grad():
        assert torch.equal(convolve(x, w, kernel, 1.0, "effective", follow), fused)
    got = torch.autograd.grad(fused, leaves, g, retain_graph=True)
    truths = torch.autograd.grad(separate, leaves, g)
    for grad, truth in zip(got, truths, strict=True):
        assert (grad.double() - truth.double()).norm() < 0.01 * truth.double().norm()
    again = torch.autograd.grad(fused, leaves, g, create_graph=True)  # in plain torch
    for grad, truth in zip(again, truths, strict=True):
        assert (grad.double() - truth.double()).norm() < 0.02 * truth.double().norm()


def test_what_follows_is_checked(convolve: Callable[..., Tensor]):
    x, kernel, g = conv_operands()
    with pytest.raises(ValueError, match=r"mp_silu_modulated: c must have shape \[2, 8\], got \[2, 7\]"):
        convolve(x, kernel, kernel, 1.0, "effective", ModulatedSiLU(torch.ones(2, 7)))
    with pytest.raises(ValueError, match="mp_sum: a and b must have one shape"):
        convolve(x, kernel, kernel, 1.0, "effective", SumWith(g[:1]))


@pytest.mark.parametrize("gradients", ["raw", "effective"])
def test_second_derivatives(convolve: Callable[..., Tensor], gradients: str):
    x, kernel, g = conv_operands()
    x.requires_grad_()
    w = kernel.detach().float().requires_grad_()
    y = convolve(x, w, kernel, 1.0, gradients)
    grad_x, grad_w = torch.autograd.grad(y, (x, w), g, create_graph=True)
    second = torch.autograd.grad(grad_x.float().square().sum() + grad_w.square().sum(), (x, w))
    xd, wd = (t.detach().double().requires_grad_() for t in (x, w))
    exact = F.conv2d(xd, reference.effective_weight(wd) if gradients == "raw" else wd, padding=1)
    first = torch.autograd.grad(exact, (xd, wd), g.double(), create_graph=True)
    truths = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (xd, wd))
    for got, truth in zip(second, truths, strict=True):
        assert (got.double() - truth).norm() < 0.03 * truth.norm()


CONV_FAKES = {
    "mp_conv2d": ("fake_forward", lambda x, w, g, c: (x, w, None, [])),
    "mp_conv2d_backward_input": ("fake_backward_input", lambda x, w, g, c: (g, w, [])),
    "mp_conv2d_backward_weight": ("fake_backward_weight", lambda x, w, g, c: (g, x, 3, 3, [])),
    "mp_conv2d_silu_modulated": ("fake_silu_modulated", lambda x, w, g, c: (x, w, c, True, [])),
    "mp_conv2d_sum": ("fake_sum", lambda x, w, g, c: (x, w, g, 0.3, 256.0, False, [])),
}


@pytest.mark.parametrize("name", CONV_FAKES)
def test_conv_opcheck(ops: SimpleNamespace, name: str):
    """What tests/ops/test_opcheck.py does for ops that have CPU kernels."""
    fake, arguments = CONV_FAKES[name]
    module = importlib.import_module("edm2ext.ops.mp_conv2d")
    torch.library.register_fake(f"edm2_emulated::{name}", getattr(module, fake), allow_override=True)
    x, w, g = conv_operands()
    c = torch.randn(2, 8).to(x.dtype)
    torch.library.opcheck(getattr(ops, name).default, arguments(x, w, g, c))


def test_bad_input_to_mp_conv2d(ops: SimpleNamespace):
    x, w, g = conv_operands()
    c = torch.ones(2, 8, dtype=x.dtype)
    for message, call in {
        "mp_conv2d: x: expected float16 or bfloat16, got Float": lambda: ops.mp_conv2d(x.float(), w, None, []),
        "mp_conv2d: w: expected dtype BFloat16, got Half": lambda: ops.mp_conv2d(x, w.half(), None, []),
        r"mp_conv2d: w: expected 4 dimensions, got shape \[8, 16\]": lambda: ops.mp_conv2d(x, w[..., 0, 0], None, []),
        "mp_conv2d: x: expected 16 channels for w": lambda: ops.mp_conv2d(x[:, :8], w, None, []),
        "mp_conv2d: w: expected multiples of 8 channels, got 16 in and 7 out": lambda: ops.mp_conv2d(
            x, w[:7], None, []
        ),
        "mp_conv2d: w: expected odd filter sizes .*, got 3 x 2": lambda: ops.mp_conv2d(x, w[..., :2], None, []),
        "mp_conv2d: gain: expected one float32, got Half": lambda: ops.mp_conv2d(x, w, torch.ones(1).half(), []),
        "mp_conv2d: plan: expected nothing, or a tile below 4 and 1 to 9 splits": (
            lambda: ops.mp_conv2d(x, w, None, [4, 1])
        ),
        "mp_conv2d_backward_input: grad: expected 8 channels": lambda: ops.mp_conv2d_backward_input(g[:, :4], w, []),
        "mp_conv2d_backward_weight: grad: expected the images of x": (
            lambda: ops.mp_conv2d_backward_weight(g[:1], x, 3, 3, [])
        ),
        r"mp_conv2d_silu_modulated: c: expected shape \[2, 8\], got \[1, 8\]": (
            lambda: ops.mp_conv2d_silu_modulated(x, w, c[:1], True, [])
        ),
        "mp_conv2d_sum: skip: expected shape": lambda: ops.mp_conv2d_sum(x, w, g[:1], 0.3, 1.0, True, []),
        "mp_conv2d_sum: clip: expected at least 0, got -1": lambda: ops.mp_conv2d_sum(x, w, g, 0.3, -1.0, True, []),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


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
    for clip in (math.inf, 0.9):
        check(
            lambda a, b: ops.mp_sum(a, b, 0.3, clip),  # noqa: B023
            lambda g, a, b: ops.mp_sum_backward(g, a, b, 0.3, clip),  # noqa: B023
            lambda a, b: reference.mp_sum(a, b, 0.3, None if clip == math.inf else clip),  # noqa: B023
            inputs,
            layout,
            grad_layout,
        )


def test_mp_sum_of_any_dimension(ops: SimpleNamespace):
    for shape in ((), (7,), (2, 3, 4, 5, 2, 2)):
        a, b = torch.randn(shape), torch.randn(shape)
        torch.testing.assert_close(ops.mp_sum(a, b, 0.3, 1.0), reference.mp_sum(a, b, 0.3, 1.0))


def test_mp_sum_backward_without_clipping_ignores_the_inputs(ops: SimpleNamespace):
    grad, x = torch.ones(2, 3), torch.full((2, 3), math.nan)
    for grad_x in ops.mp_sum_backward(grad, x, x, 0.5, math.inf):
        torch.testing.assert_close(grad_x, grad / math.sqrt(2))


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
    inputs = [x, x.half() + 1, _strided(x + 2), x.bfloat16().t().contiguous().t()]
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


def test_ema_update(ops: SimpleNamespace):
    shapes = [(4, 3, 3, 3), (), (5,), (0,)]
    params = [emulated.random_tensor(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]
    params[0] = _channels_last(params[0])
    emas = [[emulated.random_tensor(*p.shape, dtype=torch.float32, seed=9 + k) for p in params] for k in range(2)]
    expected = [
        [e.lerp(p, w) for e, p in zip(profile, params, strict=True)]
        for profile, w in zip(emas, (0.1, 0.7), strict=True)
    ]
    emas[1][0] = _strided(emas[1][0])
    ops.ema_update_([e for profile in emas for e in profile], params, [0.1, 0.7])
    torch.testing.assert_close(emas, expected)


WEIGHTS = [(5, 7), (6, 4, 3, 3), (3, 5, 1, 1), (2, 600), (0, 4)]


def _weights(layout: str, seed: int = 0) -> list[Tensor]:
    sizes = [emulated.random_tensor(*shape, dtype=torch.float32, seed=seed + i) for i, shape in enumerate(WEIGHTS)]
    return [LAYOUTS[layout](w) if w.dim() in (4, 5) or layout != "channels_last" else w for w in sizes]


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
def test_effective_weights(ops: SimpleNamespace, layout: str, grad_layout: str):
    weights, gains = _weights(layout), [torch.tensor(0.3 + i) for i in range(len(WEIGHTS))]
    leaves = [t.detach().double().requires_grad_() for t in (*weights, *gains)]
    expected = reference.effective_weight(leaves[: len(weights)], leaves[len(weights) :])
    grads = [torch.full((1,) * w.dim(), 0.5).expand(w.shape) for w in weights]
    if grad_layout != "expanded":
        grads = _weights(grad_layout, seed=20)
    truths = torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    outs = ops.effective_weights(weights, gains, EPS, torch.float16)
    found = [t for ts in ops.effective_weights_backward(grads, weights, gains, EPS) for t in ts]
    for out, truth in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, truth.detach().half(), rtol=2e-3, atol=1e-5)
    for w, out, grad in zip(weights, outs, found, strict=False):
        assert out.is_contiguous(memory_format=reference.memory_format(w))
        assert grad.is_contiguous(memory_format=reference.memory_format(w))
    for grad, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-5)
    for i, w in enumerate(weights):
        torch.testing.assert_close(ops.effective_weight(w, gains[i], 1.0, EPS, torch.float16), outs[i])
        torch.testing.assert_close(
            ops.effective_weight_backward(grads[i], w, gains[i], 1.0, EPS), (found[i], found[len(weights) + i])
        )
        scaled = ops.effective_weight_backward(grads[i], w, None, 0.7, EPS)
        torch.testing.assert_close(scaled[0], found[i] * (0.7 / gains[i]))
        torch.testing.assert_close(ops.normalize_weight(w, EPS), reference.normalize_weight(w))
        plain = w.detach().requires_grad_()
        (truth,) = torch.autograd.grad(reference.normalize_weight(plain), plain, grads[i])
        torch.testing.assert_close(ops.normalize_weight_backward(grads[i], w, EPS), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("force", [False, True])
def test_prepare_weights(ops: SimpleNamespace, force: bool, out_layout: str, layout: str):
    weights = _weights(layout)
    raw = [w.clone() for w in weights]
    expected_weights = [reference.normalize_weight(w) for w in weights] if force else raw
    gains = [torch.tensor(0.5) if i % 2 else None for i in range(len(weights))]
    expected = [
        reference.effective_weight(w, 1 if g is None else g) for w, g in zip(expected_weights, gains, strict=True)
    ]
    out = [torch.full_like(w, torch.nan) for w in _weights(out_layout)]
    ops.prepare_weights(weights, gains, EPS, force, out)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(out, expected)
    again = [w.clone() for w in raw]
    ops.force_normalize_(again, EPS)
    torch.testing.assert_close(again, [reference.normalize_weight(w) for w in raw])


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


@pytest.mark.parametrize("effective", [False, True])
def test_adam_step(ops: SimpleNamespace, effective: bool):
    """Against the CPU's native op, which tests/test_optim.py compares with torch.optim.Adam."""
    shapes = [(6, 4, 3, 3), (5, 70), (9,), (), (2, 600)]
    values = [
        [emulated.random_tensor(*shape, dtype=torch.float32, seed=10 * k + i).abs() for i, shape in enumerate(shapes)]
        for k in range(6)
    ]
    values[0][0] = _channels_last(values[0][0])
    for k in range(2, 6):
        values[k][0] = _channels_last(values[k][0])
    grads = [*values[1][:3], None if effective else values[1][3], values[1][4]]
    scalars = torch.tensor([0.1, 0.5, 0.2, 0.9], dtype=torch.float64)
    results = []
    for namespace in (ops, torch.ops.edm2):
        params, _, exp_avgs, exp_avg_sqs, *emas = [[t.clone() for t in tensors] for tensors in values]
        prepared = [torch.zeros(6, 4, 3, 3), torch.zeros(5, 70, dtype=torch.bfloat16)]
        counts = torch.zeros(7, dtype=torch.int64)
        namespace.adam_step_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [e for profile in emas for e in profile],
            prepared,
            [0, 1],
            [1, 1, 0, 0, 1],
            [-1, 3, -1, -1, -1],
            [0, 1, 2, 3, 6],
            scalars,
            torch.tensor(2.0),
            counts,
            0.9,
            0.99,
            1e-8,
            EPS,
            effective,
            True,
        )
        results.append([*params, *exp_avgs, *exp_avg_sqs, *emas[0], *emas[1], *prepared, counts])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_errors_of_adam_step(ops: SimpleNamespace):
    p, scalars, counts = torch.ones(2, 3), torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def call(
        params: list[Tensor],
        grads: list[Tensor | None],
        prepared: list[Tensor] = [],  # noqa: B006 - never changed
        gains: list[int] = [-1],  # noqa: B006
        scalars: Tensor = scalars,
    ) -> None:
        ops.adam_step_(
            params, grads, params, params, [], prepared, [0] * len(prepared), [1] * len(params), gains,
            [0] * len(params), scalars, None, counts, 0.9, 0.99, 1e-8, EPS, False, False,
        )  # fmt: skip

    for message, arguments in {
        "params: expected float32 on a GPU, got Double": ([p.double()], [p.double()]),
        "grads: expected one entry per parameter, 1, got 0": ([p], []),
        "grads: expected shape": ([p], [p[:1]]),
        "params: expected weights of shape": ([p[0]], [p[0]]),
        "params: expected contiguous or channels_last": ([p.t()], [p.t()]),
        "prepared: expected float32, float16 or bfloat16 on a GPU": ([p], [p], [p.double()]),
        "prepared_of: expected the index of a weight": ([p], [None], [p]),
        "gains: expected the indices of parameters": ([p], [p], [], [5]),
        "scalars: expected 2 elements of Double, got 3": ([p], [p], [], [-1], torch.ones(3, dtype=torch.float64)),
    }.items():
        with pytest.raises(RuntimeError, match=f"adam_step_: {message}"):
            call(*arguments)


def test_double_is_refused(ops: SimpleNamespace):
    x = torch.ones(2, 3, 4, dtype=torch.float64)
    message = "expected float32, float16 or bfloat16 on a GPU, got Double"
    for call in (
        lambda: ops.pixel_norm(x, EPS),
        lambda: ops.pixel_norm_silu_backward(x, x, x, EPS),
        lambda: ops.mp_silu(x),
        lambda: ops.mp_silu_backward(x, x),
        lambda: ops.mp_silu_modulated(x, x[..., 0]),
        lambda: ops.mp_silu_modulated_backward(x, x, x[..., 0]),
        lambda: ops.resample_up(x[None], [1.0, 1.0]),
        lambda: ops.qkv_norm(x, 1, EPS),
        lambda: ops.resample_down_pixel_norm(x[None], EPS),
        lambda: ops.mp_sum(x, x, 0.5, 1.0),
        lambda: ops.mp_sum_backward(x, x, x, 0.5, 1.0),
        lambda: ops.mp_cat(x, x, 0.5),
        lambda: ops.mp_cat_silu_backward(x, x, x, 1, 0.5),
        lambda: ops.mp_fourier(x[0, 0], x[0, 0], x[0, 0]),
        lambda: ops.mp_fourier_backward(x[0, :, :3], x[0, :, 0], x[0, :, 0], x[0, :, 0]),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    w = torch.ones(2, 3)
    for call in (
        lambda: ops.normalize_weight(x, EPS),
        lambda: ops.normalize_weight_backward(x, x, EPS),
        lambda: ops.effective_weight(w, None, 1.0, EPS, torch.float64),
        lambda: ops.effective_weight_backward(w.double(), w, None, 1.0, EPS),
        lambda: ops.prepare_weights([w], [None], EPS, False, [w.double()]),
        lambda: ops.force_normalize_([x], EPS),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(RuntimeError, match="ema_update_: params: expected float32 on a GPU, got Double"):
        ops.ema_update_([x], [x], [0.5])
    with pytest.raises(RuntimeError, match="inputs: expected float16, bfloat16 or float32, got Double"):
        ops.accumulate_snapshots_(torch.zeros(1, 2, 3, 4), [x], x[0, :1, :1], False)


def test_errors_name_op_and_argument(ops: SimpleNamespace):
    x, c = torch.ones(2, 3, 4), torch.ones(2, 3)
    for message, call in {
        r"pixel_norm: x: expected shape \[batch, channels, ...\], got \[4\]": lambda: ops.pixel_norm(x[0, 0], EPS),
        r"mp_silu_modulated: c: expected shape \[2, 3\], got \[3, 2\]": lambda: ops.mp_silu_modulated(x, c.t()),
        "mp_silu_modulated: c: expected dtype Float, got Half": lambda: ops.mp_silu_modulated(x, c.half()),
        r"mp_silu_modulated_dropout: philox: expected int64 of shape \[2\], got Float of shape \[2, 3\]": lambda: (
            ops.mp_silu_modulated_dropout(x, c, c, 0, 9)
        ),
        "mp_silu_modulated_dropout: threshold: expected 0 to 65535, got 65536": lambda: ops.mp_silu_modulated_dropout(
            x, c, torch.arange(2), 0, 65536
        ),
        "mp_silu_modulated_dropout: subsequence: expected 0 to 65535, got -1": lambda: ops.mp_silu_modulated_dropout(
            x, c, torch.arange(2), -1, 9
        ),
        "mp_silu_backward: grad: expected shape": lambda: ops.mp_silu_backward(x[:1], x),
        "pixel_norm_silu_backward: grad_silu: expected dtype": lambda: ops.pixel_norm_silu_backward(
            x, x.half(), x, EPS
        ),
        "precondition_input: x: expected dtype Float, got Half": lambda: ops.precondition_input(
            x[None].half(), c[0], 0.5, torch.float16, True
        ),
        r"precondition_input: sigma: expected 1 or 1 elements, got shape \[3\]": lambda: ops.precondition_input(
            x[None], c[0], 0.5, torch.float16, True
        ),
        r"precondition_output: f: expected shape \[1, 2, 3, 4\], got \[2, 3, 4\]": lambda: ops.precondition_output(
            x[None], x, c[0, :1], 0.5
        ),
        "precondition_output: x: expected float32, float16 or bfloat16 on a GPU, got Double": (
            lambda: ops.precondition_output(x[None].double(), x[None].double(), c[0, :1].double(), 0.5)
        ),
        r"denoising_loss: u: expected shape \[1\], got \[1, 1\]": lambda: ops.denoising_loss(
            *[x[None]] * 3, c[0, :1], c[:1, :1], 0.5, 1.0
        ),
        "denoising_loss: y: expected dtype Float, got Half": lambda: ops.denoising_loss(
            x[None], x[None], x[None].half(), c[0, :1], c[0, :1], 0.5, 1.0
        ),
        r"sampler_step: t_hat: expected one number, got shape \[2\]": lambda: ops.sampler_step(
            x[None], x[None], None, 1.0, None, c[:, 0], c[0, 0], None, 0.0
        ),
        "sampler_step_input: start: expected shape": lambda: ops.sampler_step_input(
            x[None], x[None], None, 1.0, x, c[0, 0], c[0, 0], None, 0.0, 0.0, 0.5, torch.float16, True
        ),
        "resample_up: filter: expected at most 128 taps on a GPU, got 130": lambda: ops.resample_up(
            x[None], [1.0] * 130
        ),
        "resample_down: x: expected height and width of at least 2": lambda: ops.resample_down(x[None, :, :1], [1, 1]),
        "resample_down_pixel_norm_backward: y: expected the result for height 9 and width 9": (
            lambda: ops.resample_down_pixel_norm_backward(x[None], x[None], x[None], x, EPS, 9, 9)
        ),
        r"resample_down_pixel_norm_backward: rms: expected shape \[1, 3, 4\] and dtype Float, got \[2, 3, 4\]": (
            lambda: ops.resample_down_pixel_norm_backward(x[None], x[None], x[None], x, EPS, 6, 8)
        ),
        "qkv_norm: qkv: expected a multiple of 3 . heads = 6 channels, got 3": lambda: ops.qkv_norm(x, 2, EPS),
        r"qkv_norm_backward: grad_k: expected shape \[2, 1, 4, 1\]": lambda: ops.qkv_norm_backward(
            x[:, :1, :, None], x, x, x, 1, EPS
        ),
        "ema_update_: emas: expected profiles . parameters = 2": lambda: ops.ema_update_([x], [x], [0.5, 0.1]),
        r"normalize_weight: w: expected shape \[out, in, ...\], got \[4\]": lambda: ops.normalize_weight(x[0, 0], EPS),
        "effective_weight: gain: expected a float32 tensor without dimensions": lambda: ops.effective_weight(
            c, c, 1.0, EPS, torch.float32
        ),
        "effective_weights: gains: expected as many": lambda: ops.effective_weights([c], [], EPS, torch.float32),
        "effective_weight_backward: grad: expected shape": lambda: ops.effective_weight_backward(x, c, None, 1.0, EPS),
        "force_normalize_: weights: expected tensors of one dtype": lambda: ops.force_normalize_([c, c.half()], EPS),
        "prepare_weights: out: expected shape": lambda: ops.prepare_weights([c], [None], EPS, True, [c.t()]),
        "prepare_weights: out: expected a contiguous": lambda: ops.prepare_weights(
            [c], [None], EPS, True, [torch.ones(3, 2).t()]
        ),
        "ema_update_: emas: expected shape": lambda: ops.ema_update_([c], [x], [0.5]),
        "mp_sum: b: expected dtype Float, got Half": lambda: ops.mp_sum(x, x.half(), 0.5, 1.0),
        "mp_sum: clip: expected at least 0, got -1": lambda: ops.mp_sum(x, x, 0.5, -1.0),
        "mp_sum_backward: b: expected shape": lambda: ops.mp_sum_backward(x, x, x[:1], 0.5, 1.0),
        "mp_cat: b: expected the shape of a but for dimension 1": lambda: ops.mp_cat(x, x[:1], 0.5),
        "mp_cat_backward: channels_a: expected 1 to 2, got 3": lambda: ops.mp_cat_backward(x, 3, 0.5),
        "mp_cat_silu_backward: grad_silu: expected dtype": lambda: ops.mp_cat_silu_backward(x, x.half(), x, 1, 0.5),
        r"mp_fourier: x: expected one dimension, got shape \[2, 3\]": lambda: ops.mp_fourier(c, c[0], c[0]),
        r"mp_fourier_backward: grad: expected shape \[2, 3\]": lambda: ops.mp_fourier_backward(
            c.t(), c[:, 0], c[0], c[0]
        ),
        r"accumulate_snapshots_: coefs: expected float64 of shape \[1, 2\]": lambda: ops.accumulate_snapshots_(
            c, [c[0]], c.double(), False
        ),
        r"accumulate_snapshots_: inputs: expected shape \[3\]": lambda: ops.accumulate_snapshots_(
            c, [c[0, :2]], c[:1, :2].double(), False
        ),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
