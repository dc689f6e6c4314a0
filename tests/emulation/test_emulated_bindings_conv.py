"""The CUDA half of the torch layer on emulated kernels (the fixture `ops`): convolutions, and the op made of them."""

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import emulated
import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS, to_channels_last
from torch import Tensor

from edm2ext import backend, reference, set_backend
from edm2ext.nn import MPConv, PreparedWeights
from edm2ext.ops import CatWith, CosineAttention, ModulatedSiLU, SumWith, conv_choice, cosine_attention


def conv_operands(dtype: torch.dtype = torch.bfloat16, kernel: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and a gradient of y."""
    shapes = (2, 16, 5, 6), (8, 16, kernel, kernel), (2, 8, 5, 6)
    x, w, g = (emulated.random_tensor(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    return to_channels_last(x), w, g


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
    summed, mask = ops.mp_sum_clipped(to_channels_last(skip), y, 0.3, 1.0)
    for plan in ([], [3, 2]):
        fused = [ops.mp_conv2d_silu_modulated(x, w, c, keep, plan), ops.mp_conv2d_sum(x, w, skip, 0.3, 1.0, keep, plan)]
        for (out, kept), separate, besides in zip(fused, (silu, summed), (y, mask), strict=True):
            assert torch.equal(out, separate)
            assert torch.equal(kept, besides) if keep else kept.shape == (0,)
            assert kept.dtype == besides.dtype
    assert mask.any()
    assert (mask != 255).any()


@pytest.fixture
def convolve(ops: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """edm2ext.ops.mp_conv2d.convolve on the emulated kernels."""
    module = importlib.import_module("edm2ext.ops.mp_conv2d")
    for name in ("", "_backward_input", "_backward_weight", "_silu_modulated", "_sum", "_qkv_norm"):
        monkeypatch.setattr(module, f"_mp_conv2d{name}", getattr(ops, f"mp_conv2d{name}"))
    for name in ("mp_silu_modulated_backward", "qkv_norm", "qkv_norm_backward"):
        monkeypatch.setattr(module, f"_{name}", getattr(ops, name))
    sums = importlib.import_module("edm2ext.ops.mp_sum")
    monkeypatch.setattr(sums, "_mp_sum_backward", ops.mp_sum_backward)
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


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("plan", [[], [3, 2], None], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_users_of_a_sum(
    convolve: Callable[..., Tensor], ops: SimpleNamespace, layout: str, plan: conv_choice.Choice, clip: float | None
):
    """The gradients are those of separate ops, bit for bit, whatever computes the convolution, however skip lies."""
    x, kernel, g = conv_operands()
    skip = emulated.random_tensor(2, 8, 5, 6, dtype=x.dtype, seed=7)
    skip = to_channels_last(skip) if layout == "channels_last" else skip
    leaves = [t.detach().requires_grad_() for t in (x, kernel.float(), skip)]
    problem = conv_choice.Problem(0, 2, 5, 6, 16, 8, 3, 3, x.dtype, "sum", clip is not None)
    with conv_choice.trying(problem, plan):
        fused = convolve(*leaves[:2], kernel, 1.0, "effective", SumWith(leaves[2], 0.3, clip, twice=True))
    with conv_choice.trying(problem._replace(follows="", keep=False), plan):
        y = convolve(x, kernel, kernel, 1.0, "effective")
    limit = math.inf if clip is None else clip
    separate, mask = ops.mp_sum_clipped(to_channels_last(skip), y, 0.3, limit)
    assert all(torch.equal(result, separate) for result in fused)
    grads = g, g.flip(0)
    got = torch.autograd.grad(fused, leaves, grads, retain_graph=True)
    grad_skip, grad_y = ops.mp_sum_backward(*grads, mask, 0.3, True)
    truths = (
        ops.mp_conv2d_backward_input(grad_y, kernel, []),
        ops.mp_conv2d_backward_weight(grad_y, x, 3, 3, []),
        grad_skip,
    )
    again = torch.autograd.grad(fused, leaves, grads, create_graph=True)  # in plain torch
    for grad, other, truth in zip(got, again, truths, strict=True):
        assert torch.equal(grad, truth)
        assert (other - truth).norm() < 0.02 * truth.norm()
    of_skip = torch.autograd.grad(fused[0].float().square().sum(), leaves[2], create_graph=True)[0]  # alone
    second = torch.autograd.grad(of_skip.float().sum(), leaves[2], allow_unused=True)[0]
    assert second is not None


def test_only_the_skip_branch_wants_a_gradient(convolve: Callable[..., Tensor]):
    x, kernel, g = conv_operands()
    skip = emulated.random_tensor(2, 8, 5, 6, dtype=x.dtype, seed=7).requires_grad_()
    out = convolve(x, kernel, kernel, 1.0, "effective", SumWith(skip, 0.3, 1.0))
    (grad,) = torch.autograd.grad(out, skip, g, retain_graph=True)
    (again,) = torch.autograd.grad(out, skip, g, create_graph=True)
    torch.testing.assert_close(grad, again)
    weight = 0.7 / math.hypot(0.7, 0.3)
    torch.testing.assert_close(grad, torch.where(out.abs() < 1, g * weight, 0))


def attention_operands(channels: int = 384) -> tuple[Tensor, Tensor, Tensor]:
    """x, the kernel that makes q, k and v, and a gradient of the attention's output."""
    shapes = (2, 16, 3, 4), (channels, 16, 1, 1), (2, channels // 3, 3, 4)
    x, w, g = (emulated.random_tensor(*shape, dtype=torch.float16, seed=i) for i, shape in enumerate(shapes))
    return to_channels_last(x), w, to_channels_last(g)


@pytest.mark.parametrize("keep", [False, True])
def test_q_k_and_v_of_a_convolution(ops: SimpleNamespace, keep: bool):
    """Those of separate kernels, bit for bit."""
    x, w, _ = attention_operands()
    y = ops.mp_conv2d(x, w, None, [])
    *fused, kept = ops.mp_conv2d_qkv_norm(x, w, 1e-4, keep)
    for part, separate in zip(fused, ops.qkv_norm(y, 2, 1e-4), strict=True):
        assert torch.equal(part, separate)
        assert part.stride() == separate.stride()
    assert torch.equal(kept, y) if keep else kept.shape == (0,)


@pytest.mark.parametrize("plan", [[], [3, 1], None], ids=str)
def test_gradients_through_attention(convolve: Callable[..., Tensor], plan: conv_choice.Choice):
    """Against plain torch in float64: with q, k and v normalised by one kernel, by their own, and after torch's
    convolution."""
    x, kernel, g = attention_operands()
    problem = conv_choice.Problem(0, 2, 3, 4, 16, 384, 1, 1, x.dtype, "qkv", True)
    x, w = x.requires_grad_(), kernel.float().requires_grad_()
    with conv_choice.trying(problem, plan), conv_choice.trying(problem._replace(keep=False), plan):
        out = convolve(x, w, kernel, 1.0, "effective", CosineAttention(2))
        grads = torch.autograd.grad(out, (x, w), g, retain_graph=True)
        again = torch.autograd.grad(out, (x, w), g, create_graph=True)  # in plain torch
        with torch.no_grad():
            assert torch.equal(convolve(x, w, kernel, 1.0, "effective", CosineAttention(2)), out)
    assert out.is_contiguous(memory_format=torch.channels_last)
    xd, wd = (t.detach().double().requires_grad_() for t in (x, w))
    exact = reference.cosine_attention(F.conv2d(xd, wd), 2)
    truths = torch.autograd.grad(exact, (xd, wd), g.double())
    assert (out - exact).norm() < 2e-3 * exact.norm()
    for grad, other, truth in zip(grads, again, truths, strict=True):
        assert (grad - truth).norm() < 5e-3 * truth.norm()
        assert (other - truth).norm() < 5e-3 * truth.norm()


def test_heads_of_other_widths_follow_by_themselves(convolve: Callable[..., Tensor]):
    x, kernel, _ = attention_operands()
    out = convolve(x, kernel, kernel, 1.0, "effective", CosineAttention(4))  # of 32 channels
    y = convolve(x, kernel, kernel, 1.0, "effective")
    with set_backend("reference"):
        assert torch.equal(out, cosine_attention(y, 4))
    with pytest.raises(ValueError, match="cosine_attention: "):
        convolve(x, kernel, kernel, 1.0, "effective", CosineAttention(5))


@pytest.mark.parametrize("plan", [[], [3, 1], None], ids=str)
@pytest.mark.parametrize(("channels", "out"), [(5, 16), (16, 4), (3, 7)])
def test_channels_that_are_no_multiples_of_8(
    convolve: Callable[..., Tensor], channels: int, out: int, plan: conv_choice.Choice
):
    """Padded, or torch's convolution, which is what they get unless a plan was chosen."""
    shapes = (2, channels, 5, 6), (out, channels, 3, 3), (2, out, 5, 6)
    x, w, g = (emulated.random_tensor(*shape, dtype=torch.float16, seed=i) for i, shape in enumerate(shapes))
    x, kernel = to_channels_last(x).requires_grad_(), w
    w = kernel.float().requires_grad_()
    problems = [conv_choice.Problem(d, 2, 5, 6, channels, out, 3, 3, x.dtype) for d in range(3)]
    assert all(conv_choice.choice(problem) is None for problem in problems)
    xd, wd = (t.detach().double().requires_grad_() for t in (x, w))
    exact = F.conv2d(xd, wd, padding=1)
    truths = exact.detach(), *torch.autograd.grad(exact, (xd, wd), g.double())
    with contextlib.ExitStack() as stack:
        for problem in problems:
            stack.enter_context(conv_choice.trying(problem, plan))
        y = convolve(x, w, kernel, 1.0, "effective")
        got = y, *torch.autograd.grad(y, (x, w), g)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for value, truth in zip(got, truths, strict=True):
        assert value.shape == truth.shape
        assert (value - truth).norm() < 5e-3 * truth.norm()


@pytest.mark.parametrize("then", ["silu", "sum"])
def test_what_follows_padded_channels(convolve: Callable[..., Tensor], ops: SimpleNamespace, then: str):
    x, kernel, _ = conv_operands()
    x, kernel = to_channels_last(x[:, :5]), kernel[:4, :5]
    other = emulated.random_tensor(2, 4, 5, 6, dtype=x.dtype, seed=7).contiguous(memory_format=torch.channels_last)
    problem = conv_choice.Problem(0, 2, 5, 6, 5, 4, 3, 3, x.dtype, then)
    with conv_choice.trying(problem, []):
        out = convolve(x, kernel, kernel, 1.0, "effective", THEN[then](other))
    y = F.conv2d(x.double(), kernel.double(), padding=1)
    with set_backend("reference"):
        torch.testing.assert_close(out.double(), THEN[then](other.double())(y), rtol=2**-6, atol=0.02)


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


# ---- of an MP-Cat's halves ----

CAT = 0.3


@pytest.fixture
def cat_convolve(
    ops: SimpleNamespace, convolve: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Tensor, Tensor]]]:
    """edm2ext.ops.mp_cat_conv2d on the emulated kernels, whatever MP-Cat is asked for."""
    module = importlib.import_module("edm2ext.ops.mp_cat_conv2d")
    names = ("cat", "cat_silu", "cat_silu_only", "cat_silu_only_backward", "cat_conv2d", "cat_conv2d_backward_weight")
    for name in names:
        monkeypatch.setattr(module, f"_mp_{name}", getattr(ops, f"mp_{name}"))
    cats = importlib.import_module("edm2ext.ops.mp_cat")
    for name in ("cat_silu", "cat_silu_backward"):
        monkeypatch.setattr(cats, f"_mp_{name}", getattr(ops, f"mp_{name}"))
    monkeypatch.setattr(cats, "_KERNELS", backend.Kernels(True, True, True))
    monkeypatch.setattr(backend, "_CPU_DTYPES", backend._CUDA_DTYPES)
    monkeypatch.setattr(module, "on_tensor_cores", lambda *arguments: True)
    yield module.mp_cat_conv2d
    conv_choice.forget()


def cat_operands(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """a, b, w, and gradients of the convolution and of MP-SiLU."""
    shapes = (2, 64, 5, 6), (2, 32, 5, 6), (16, 96, 1, 1), (2, 16, 5, 6), (2, 96, 5, 6)
    a, b, w, *grads = (emulated.random_tensor(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes))
    return [to_channels_last(a), to_channels_last(b), w, *map(to_channels_last, grads)]


def cat_problem(direction: int, dtype: torch.dtype, keep: bool = False) -> conv_choice.Problem:
    return conv_choice.Problem(direction, 2, 5, 6, 96, 16, 1, 1, dtype, "", keep, cat=64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mp_cat_conv2d(ops: SimpleNamespace, dtype: torch.dtype, layout: str):
    a, b, w, g, _ = cat_operands(dtype)
    xd = reference.mp_cat(a.double(), b.double(), CAT).requires_grad_()
    wd = w.double().requires_grad_()
    exact = F.conv2d(xd, wd)
    exact.backward(g.double())
    a, b, w, g = map(LAYOUTS[layout], (a, b, w, g))
    for plan in ([], [3, 2], [1, 1]):
        y = ops.mp_cat_conv2d(a, b, w, CAT, plan)
        grad_w = ops.mp_cat_conv2d_backward_weight(g, a, b, CAT, plan)
        assert y.dtype == dtype
        assert grad_w.dtype == torch.float32
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), exact.detach(), rtol=2**-8, atol=1e-2)
        torch.testing.assert_close(grad_w.double(), wd.grad, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("gradients", ["raw", "effective"])
def test_gradients_of_halves(cat_convolve: Callable[..., tuple[Tensor, Tensor]], ops: SimpleNamespace, gradients: str):
    """Those of a and b and MP-SiLU are the bits that the concatenation gives; the others are nearer to float64."""
    a, b, w, *grads = cat_operands()
    gain = torch.tensor(0.7)
    leaves = [t.detach().requires_grad_() for t in (a, b, w.float(), gain)]
    raw = gradients == "raw"
    inputs = leaves if raw else leaves[:3]
    call = (*leaves[:4], CAT) if raw else (*leaves[:3], 1, CAT)
    y, x_silu = cat_convolve(*call, prepared=not raw)
    got = torch.autograd.grad((y, x_silu), inputs, grads)
    kernel = reference.effective_weight(w.float(), gain, w.dtype) if raw else w
    x, same = ops.mp_cat_silu(a, b, CAT)
    assert torch.equal(x_silu, same)
    grad_x = ops.mp_conv2d_backward_input(grads[0], kernel, [])
    for grad, same in zip(got, ops.mp_cat_silu_backward(grad_x, grads[1], x, 64, CAT), strict=False):
        assert torch.equal(grad, same)
    with torch.no_grad():
        assert all(map(torch.equal, (y, x_silu), cat_convolve(*call, prepared=not raw)))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    weight = reference.effective_weight(*exact[2:]) if raw else exact[2]
    whole = reference.mp_cat_conv2d(*exact[:2], weight, t=CAT, prepared=True)
    truths = torch.autograd.grad(whole, exact, [g.double() for g in grads])
    torch.testing.assert_close(y.double(), whole[0], rtol=2**-7, atol=0.02)
    for grad, truth in zip(got, truths, strict=True):
        assert grad.dtype in (torch.float32, torch.bfloat16)
        assert (grad.double() - truth).norm() < 5e-3 * truth.norm()


@pytest.mark.parametrize("wanted", range(3))
def test_one_gradient_of_halves_alone(cat_convolve: Callable[..., tuple[Tensor, Tensor]], wanted: int):
    a, b, w, *grads = cat_operands()
    leaves = [t.detach().requires_grad_() for t in (a, b, w)]
    together = torch.autograd.grad(cat_convolve(*leaves, t=CAT, prepared=True), leaves, grads)
    alone = [leaf if i == wanted else leaf.detach() for i, leaf in enumerate(leaves)]
    y, x_silu = cat_convolve(*alone, t=CAT, prepared=True)
    outputs = (y, x_silu)[: 1 if wanted == 2 else 2]
    if wanted == 2:
        x_silu = x_silu.detach()
    (grad,) = torch.autograd.grad(outputs, alone[wanted], grads[: len(outputs)])
    assert torch.equal(grad, together[wanted])
    (of_silu,) = torch.autograd.grad(cat_convolve(*leaves, t=CAT, prepared=True)[1], leaves[:1], grads[1])
    rows = reference.mp_silu(reference.mp_cat(leaves[0].double(), b.double(), CAT))
    (truth,) = torch.autograd.grad(rows, leaves[0], grads[1].double())
    assert (of_silu - truth).norm() < 5e-3 * truth.norm()


@pytest.mark.parametrize("stored", [(0,), (2,), (0, 2)], ids=str)
def test_concatenated_where_that_was_chosen(
    cat_convolve: Callable[..., tuple[Tensor, Tensor]], ops: SimpleNamespace, stored: tuple[int, ...]
):
    """For the forward pass, and with it the gradient of the weight, or for that only: the bits of separate ops."""
    a, b, w, *grads = cat_operands()
    leaves = [t.detach().requires_grad_() for t in (a, b, w)]
    x, same = ops.mp_cat_silu(a, b, CAT)
    with conv_choice.recording() as asked:
        by_halves = cat_convolve(*leaves, t=CAT, prepared=True)
        halves_grad = torch.autograd.grad(by_halves, leaves, grads)[2]
    assert set(asked) >= {cat_problem(0, a.dtype, True), cat_problem(2, a.dtype)}
    conv_choice.choose({cat_problem(d, a.dtype, keep=d == 0): None for d in stored})
    y, x_silu = cat_convolve(*leaves, t=CAT, prepared=True)
    got = torch.autograd.grad((y, x_silu), leaves, grads)
    assert torch.equal(x_silu, same)
    assert torch.equal(y, ops.mp_conv2d(x, w, None, []) if 0 in stored else by_halves[0])
    assert torch.equal(got[2].float(), ops.mp_conv2d_backward_weight(grads[0], x, 1, 1, []).to(w.dtype).float())
    assert (got[2] - halves_grad).norm() < 0.01 * halves_grad.norm()
    conv_choice.choose({cat_problem(0, a.dtype): None})
    with torch.no_grad():
        assert torch.equal(cat_convolve(a, b, w, t=CAT, prepared=True)[0], ops.mp_conv2d(x, w, None, []))


def test_torchs_gradient_of_the_concatenation(cat_convolve: Callable[..., tuple[Tensor, Tensor]]):
    a, b, w, *grads = cat_operands()
    leaves = [t.detach().requires_grad_() for t in (a, b, w)]
    expected = torch.autograd.grad(cat_convolve(*leaves, t=CAT, prepared=True), leaves, grads)
    conv_choice.choose({conv_choice.Problem(1, 2, 5, 6, 96, 16, 1, 1, a.dtype): None})
    got = torch.autograd.grad(cat_convolve(*leaves, t=CAT, prepared=True), leaves, grads)
    for grad, other in zip(got, expected, strict=True):
        assert (grad - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("raw", [True, False])
def test_second_derivatives_of_halves(cat_convolve: Callable[..., tuple[Tensor, Tensor]], raw: bool):
    a, b, w, *grads = cat_operands()
    leaves = [t.detach().requires_grad_() for t in (a, b, w.float())]
    outputs = cat_convolve(*leaves, 1, CAT, prepared=not raw)
    first = torch.autograd.grad(outputs, leaves, grads, create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    whole = reference.mp_cat_conv2d(*exact, 1, CAT, prepared=not raw)
    truth = torch.autograd.grad(whole, exact, [g.double() for g in grads], create_graph=True)
    truths = torch.autograd.grad(sum(g.square().sum() for g in truth), exact)
    for got, of in ((first, truth), (second, truths)):
        for grad, right in zip(got, of, strict=True):
            assert (grad.double() - right).norm() < 0.03 * right.norm()


def test_layers_read_halves(cat_convolve: Callable[..., tuple[Tensor, Tensor]]):
    """With their own weight and with a prepared one."""
    a, b, _, *grads = cat_operands()
    layer = MPConv(96, 16, 1)
    results = []
    for prepared in (False, True):
        layer.weight.grad = None
        weights = PreparedWeights(layer, dtype=a.dtype, memory_format=torch.channels_last)
        with weights if prepared else contextlib.nullcontext(), conv_choice.recording() as asked:
            outputs = layer(a, first=CatWith(b, CAT))
            torch.autograd.backward(outputs, grads)
        assert cat_problem(0, a.dtype, True) in asked
        results.append([*outputs, layer.weight.grad])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b, w: (a[:, :40], b, w[:, :72]),  # channels
        lambda a, b, w: (a, b, w[:12]),
        lambda a, b, w: (a, b.contiguous(), w),  # layout
        lambda a, b, w: (a, b, w.tile(1, 1, 3, 3)),  # taps
    ],
)
def test_what_is_concatenated_nevertheless(
    cat_convolve: Callable[..., tuple[Tensor, Tensor]],
    change: Callable[..., tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
):
    a, b, w = change(*cat_operands()[:3])
    monkeypatch.setattr(importlib.import_module("edm2ext.ops.mp_cat_conv2d"), "_mp_cat_conv2d", None)
    got = cat_convolve(a, b, w, t=CAT, prepared=True)
    expected = reference.mp_cat_conv2d(a.double(), b.double(), w.double(), t=CAT, prepared=True)
    for result, truth in zip(got, expected, strict=True):
        assert (result - truth).norm() < 5e-3 * truth.norm()
    for t in (0.0, 1.0):  # one weight is zero
        assert cat_convolve(*cat_operands()[:3], t=t, prepared=True)[0].isfinite().all()


def test_halves_are_checked(cat_convolve: Callable[..., tuple[Tensor, Tensor]]):
    a, b, w, *_ = cat_operands()
    for arguments, error in (
        ((a, b[:1], w), "mp_cat: a and b must agree"),
        ((a, b, w[:, :64]), "mp_conv2d: x must have 64 channels"),
        ((a, b, w, 2.0), "mp_conv2d: gain must be 1 with a prepared weight"),
        ((a, b, w, 1, 2.0), "mp_cat: t must be in"),
    ):
        with pytest.raises(ValueError, match=error):
            cat_convolve(*arguments, prepared=True)


def test_bad_input_to_mp_cat_conv2d(ops: SimpleNamespace):
    a, b, w, g, _ = cat_operands()
    for message, call in {
        "mp_cat_conv2d: a: expected float16 or bfloat16, got Float": lambda: ops.mp_cat_conv2d(
            a.float(), b, w, CAT, []
        ),
        "mp_cat_conv2d: b: expected dtype BFloat16, got Half": lambda: ops.mp_cat_conv2d(a, b.half(), w, CAT, []),
        r"mp_cat_conv2d: b: expected 32 channels and .* \[2, 64, 5, 6\]": lambda: ops.mp_cat_conv2d(
            a, b[:1], w, CAT, []
        ),
        r"mp_cat_conv2d: a: expected a multiple of 32 channels": lambda: ops.mp_cat_conv2d(a[:, :40], b, w, CAT, []),
        r"mp_cat_conv2d: w: expected shape \[out, 96, 1, 1\]": lambda: ops.mp_cat_conv2d(a, b, w[:, :64], CAT, []),
        "mp_cat_conv2d: t: expected 0.001 to 0.999, got 0": lambda: ops.mp_cat_conv2d(a, b, w, 0.0, []),
        "mp_cat_conv2d: plan: expected nothing, or a tile below 4 and 1 to 3 splits": (
            lambda: ops.mp_cat_conv2d(a, b, w, CAT, [4, 1])
        ),
        "mp_cat_conv2d_backward_weight: grad: expected 16 channels": (
            lambda: ops.mp_cat_conv2d_backward_weight(g[:1], a, b, CAT, [])
        ),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


CAT_FAKES = {
    "mp_cat_conv2d": ("fake_cat_forward", lambda a, b, w, g, s: (a, b, w, CAT, [])),
    "mp_cat_conv2d_backward_weight": ("fake_cat_backward_weight", lambda a, b, w, g, s: (g, a, b, CAT, [])),
    "mp_cat_silu_only": ("fake_silu_only", lambda a, b, w, g, s: (a, b, CAT)),
    "mp_cat_silu_only_backward": ("fake_silu_only_backward", lambda a, b, w, g, s: (s, s, a, b, CAT)),
}


@pytest.mark.parametrize("name", CAT_FAKES)
def test_cat_conv_opcheck(ops: SimpleNamespace, name: str):
    fake, arguments = CAT_FAKES[name]
    module = importlib.import_module("edm2ext.ops.mp_cat_conv2d")
    torch.library.register_fake(f"edm2_emulated::{name}", getattr(module, fake), allow_override=True)
    torch.library.opcheck(getattr(ops, name).default, arguments(*cat_operands()))


CONV_FAKES = {
    "mp_conv2d": ("fake_forward", lambda x, w, g, c: (x, w, None, [])),
    "mp_conv2d_backward_input": ("fake_backward_input", lambda x, w, g, c: (g, w, [])),
    "mp_conv2d_backward_weight": ("fake_backward_weight", lambda x, w, g, c: (g, x, 3, 3, [])),
    "mp_conv2d_silu_modulated": ("fake_silu_modulated", lambda x, w, g, c: (x, w, c, True, [])),
    "mp_conv2d_sum": ("fake_sum", lambda x, w, g, c: (x, w, g, 0.3, 256.0, True, [])),
    "mp_conv2d_qkv_norm": ("fake_qkv_norm", lambda x, w, g, c: (x, w.tile(24, 1, 1, 1), 1e-4, True)),
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
        "mp_conv2d_qkv_norm: w: expected a multiple of 192 channels out, got 8": (
            lambda: ops.mp_conv2d_qkv_norm(x, w, 1e-4, True)
        ),
        "mp_conv2d_sum: skip: expected shape": lambda: ops.mp_conv2d_sum(x, w, g[:1], 0.3, 1.0, True, []),
        "mp_conv2d_sum: clip: expected at least 0, got -1": lambda: ops.mp_conv2d_sum(x, w, g, 0.3, -1.0, True, []),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
