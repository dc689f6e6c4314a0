"""The convolution kernels on a GPU: every tile and direction, exactly and against float64; what follows; graphs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import edm2ext
from edm2ext import ops, reference, tune
from edm2ext.nn import MPConv, PreparedWeights
from edm2ext.ops import conv_choice
from edm2ext.ops.conv_choice import Problem

pytestmark = pytest.mark.gpu
if not (edm2ext.build_info()["cuda"] and torch.cuda.is_available()):
    pytest.skip(f"no GPU to test on: {edm2ext.build_info()['cuda_reason']}", allow_module_level=True)
if not torch._C._dispatch_has_kernel_for_dispatch_key("edm2::mp_conv2d", "CUDA"):
    pytest.skip("built without EDM2EXT_CONV", allow_module_level=True)

NATIVE = torch.ops.edm2
PORTABLE = 4
SMALL = Problem(0, 2, 8, 8, 64, 64, 3, 3, torch.float16)
TILES = sorted({tile for tile, _ in tune.plans(SMALL, 1, tune.gpu_at_hand().wgmma)})  # Hopper's own among them
# Batch, channels in and out, height, width, filter size.
SHAPES = [
    (2, 192, 192, 64, 64, 3),
    (8, 768, 768, 8, 8, 3),
    (3, 40, 328, 17, 9, 3),
    (2, 384, 1152, 16, 16, 1),
    (1, 8, 8, 1, 1, 3),
    (5, 72, 24, 13, 31, 5),
]


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with edm2ext.set_backend("native"):
        yield


def operands(shape: tuple[int, ...], dtype: torch.dtype, whole: bool = False) -> list[Tensor]:
    """x, w and a gradient of y, channels_last; of whole numbers, small enough for exact sums."""
    n, c, k, h, w, r = shape

    def make(*sizes: int) -> Tensor:
        values = torch.randint(-1, 2, sizes, device="cuda") if whole else torch.randn(sizes, device="cuda")
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    return [make(n, c, h, w), make(k, c, r, r), make(n, k, h, w)]


def run(x: Tensor, w: Tensor, g: Tensor, plan: list[int]) -> list[Tensor]:
    """y and the gradients of x and w."""
    r = w.shape[2]
    return [
        NATIVE.mp_conv2d(x, w, None, plan),
        NATIVE.mp_conv2d_backward_input(g, w, plan),
        NATIVE.mp_conv2d_backward_weight(g, x, r, r, plan),
    ]


def plain(x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    """The same by torch, in the operands' dtype."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = F.conv2d(x, w, padding=w.shape[2] // 2)
    y.backward(g)
    return [y.detach(), x.grad, w.grad]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_exactly(shape: tuple[int, ...], tile: int):
    inputs = operands(shape, torch.float16, whole=True)
    expected = plain(*(t.double() for t in inputs))
    depth = 32 if tile < PORTABLE else 64
    steps = min(-(-shape[0] * shape[3] * shape[4] // depth), shape[5] ** 2 * -(-min(shape[1:3]) // depth))
    for splits in {1, min(3, steps)}:
        for got, truth in zip(run(*inputs, [tile, splits]), expected, strict=True):
            exact = truth.abs() <= (2**24 if got.dtype == torch.float32 else 2048)  # beyond, float16 rounds
            assert torch.equal(got[exact].double(), truth[exact])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(shape: tuple[int, ...], dtype: torch.dtype):
    inputs = operands(shape, dtype)
    exact = plain(*(t.double() for t in inputs))
    for got, low, truth in zip(run(*inputs, []), plain(*inputs), exact, strict=True):
        unit = torch.finfo(got.dtype).eps * truth.abs().max()
        assert (got.double() - truth).abs().max() <= 2 * (low.double() - truth).abs().max() + unit


def test_same_bits_every_time():
    inputs = operands(SHAPES[1], torch.float16)
    first = run(*inputs, [])
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(*inputs, []), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_follows(dtype: torch.dtype):
    x, w, skip = operands(SHAPES[0], dtype)
    w *= (w.numel() / w.shape[0]) ** -0.5
    c = torch.randn(2, 192, device="cuda").to(dtype)
    y = ops.mp_conv2d(x, w, prepared=True)
    silu = ops.mp_conv2d(x, w, prepared=True, then=ops.ModulatedSiLU(c))
    summed = ops.mp_conv2d(x, w, prepared=True, then=ops.SumWith(skip, 0.3, 1.5))
    masked, mask = NATIVE.mp_conv2d_sum(x, w, skip, 0.3, 1.5, True, [])
    assert torch.equal(silu, ops.mp_silu_modulated(y, c))
    assert torch.equal(summed, ops.mp_sum(skip, y, 0.3, 1.5))
    assert torch.equal(masked, summed)
    assert torch.equal(mask, NATIVE.mp_sum_clipped(skip, y, 0.3, 1.5)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_q_k_and_v(dtype: torch.dtype):
    """Bit for bit those of the kernel that takes the convolution apart, and the gradients too."""
    x, w, g = operands(SHAPES[3], dtype)
    w *= w.shape[1] ** -0.5
    y = NATIVE.mp_conv2d(x, w, None, [1, 1])
    *parts, kept = NATIVE.mp_conv2d_qkv_norm(x, w, 1e-4, True)
    assert torch.equal(kept, y)
    for part, separate in zip(parts, NATIVE.qkv_norm(y, 6, 1e-4), strict=True):
        assert torch.equal(part, separate)
    x, w, g = x.requires_grad_(), w.float().requires_grad_(), g[:, :384]
    fused = ops.mp_conv2d(x, w, prepared=True, then=ops.CosineAttention(6))
    separate = ops.cosine_attention(ops.mp_conv2d(x, w, prepared=True), 6)
    assert (fused - separate).norm() < 0.01 * separate.norm()  # not the same bits: the plan of the other is free
    got, expected = (torch.autograd.grad(out, (x, w), g) for out in (fused, separate))
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize(("channels", "out"), [(5, 192), (192, 4)])
def test_padded_channels(channels: int, out: int):
    x, w, g = operands((4, channels, out, 32, 32, 3), torch.float16)
    exact = plain(*(t.double() for t in (x, w, g)))
    problems = [Problem(d, 4, 32, 32, channels, out, 3, 3, x.dtype) for d in range(3)]
    x, w = x.requires_grad_(), w.float().requires_grad_()
    conv_choice.choose({problem: [] for problem in problems})
    y = ops.mp_conv2d(x, w, prepared=True)
    got = y, *torch.autograd.grad(y, (x, w), g)
    conv_choice.forget()
    for value, truth in zip(got, exact, strict=True):
        assert (value - truth).norm() < 1e-3 * truth.norm()


HALVES = [(2, 192, 384, 64, 64, 192), (5, 32, 96, 13, 31, 72), (1, 64, 32, 1, 1, 8), (8, 768, 576, 8, 8, 768)]


def halves(shape: tuple[int, ...], dtype: torch.dtype, whole: bool = False) -> tuple[Tensor, ...]:
    """a, b, w and a gradient of y."""
    n, in_a, in_b, h, w, k = shape
    x, weight, g = operands((n, in_a + in_b, k, h, w, 1), dtype, whole)
    a, b = (t.contiguous(memory_format=torch.channels_last) for t in x.split([in_a, in_b], 1))
    return a, b, weight, g


@pytest.mark.parametrize("tile", range(PORTABLE))
@pytest.mark.parametrize("shape", HALVES, ids=str)
def test_halves_of_whole_numbers(shape: tuple[int, ...], tile: int):
    """Up to the weights of the halves, which are no whole numbers: against float64, in float32 and rounded once."""
    a, b, w, g = halves(shape, torch.float16, whole=True)
    x = reference.mp_cat(a.double(), b.double(), 0.3)
    exact = plain(x, w.double(), g.double())
    steps = min(x.shape[1], -(-g[:, 0].numel() // 32) * 32) // 32
    for splits in {1, min(3, steps), min(5, steps)}:
        y = NATIVE.mp_cat_conv2d(a, b, w, 0.3, [tile, splits])
        grad_w = NATIVE.mp_cat_conv2d_backward_weight(g, a, b, 0.3, [tile, splits])
        for got, truth in ((y, exact[0]), (grad_w, exact[2])):
            assert (got.double() - truth).abs().max() <= torch.finfo(got.dtype).eps * 4 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", HALVES, ids=str)
def test_convolution_of_a_concatenation(shape: tuple[int, ...], dtype: torch.dtype):
    """Halves read in place, or joined: MP-SiLU and the gradients of the halves are the same bits."""
    a, b, w, g = halves(shape, dtype)
    w *= w.shape[1] ** -0.5
    leaves = [a.requires_grad_(), b.requires_grad_(), w.float().requires_grad_()]
    n, in_a, in_b, height, width, k = shape
    problem = Problem(0, n, height, width, in_a + in_b, k, 1, 1, dtype, "", True, cat=in_a)
    found = []
    for choice in ([], None):
        with conv_choice.trying(problem, choice):
            y, x_silu = ops.mp_cat_conv2d(*leaves, t=0.3, prepared=True)
            grads = (g, torch.linspace(-1, 1, x_silu.numel(), device="cuda").view_as(x_silu).to(dtype))
            found.append([x_silu, *torch.autograd.grad((y, x_silu), leaves, grads), y])
    for i, (got, other) in enumerate(zip(*found, strict=True)):
        assert torch.equal(got, other) if i < 3 else (got - other).norm() < 0.01 * other.norm()
    with torch.no_grad():
        assert torch.equal(ops.mp_cat_conv2d(*leaves, t=0.3, prepared=True)[0], found[0][-1])


def test_tuned_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = Problem(0, 2, 8, 8, 96, 64, 1, 1, torch.float16, "", True, cat=64)
    conv_choice.forget()
    assert list(tune.tune([problem])) == tune.with_alternatives([problem])
    conv_choice.forget()


@pytest.mark.parametrize("prepared", [False, True])
def test_layer_of_halves_in_a_graph(prepared: bool):
    layer = MPConv(96, 64, 1).cuda().eval()
    a, b, _, _ = halves((2, 64, 32, 8, 8, 64), torch.float16)
    weights = PreparedWeights(layer, dtype=a.dtype, memory_format=torch.channels_last)
    with weights if prepared else contextlib.nullcontext(), torch.no_grad():
        eager = layer(a, first=ops.CatWith(b, 0.3))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(a, first=ops.CatWith(b, 0.3))
        graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, out, eager))


def test_layer_in_a_graph():
    layer = MPConv(64, 128, 3).cuda()
    x = torch.randn(4, 64, 16, 16, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    x.requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x).float().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    eager = layer(x)
    expected = reference.mp_conv2d(x.double(), layer.weight.double())
    torch.testing.assert_close(eager.double(), expected, rtol=1e-2, atol=1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = layer(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, eager)


def test_tuned_choices_are_taken_in_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x, w, _ = operands((2, 64, 64, 8, 8, 3), torch.float16)
    conv_choice.forget()
    times = tune.tune([SMALL])
    assert set(times[SMALL]) == {tune.name_of(choice) for choice in tune.offers(SMALL, tune.gpu_at_hand())}
    eager = ops.mp_conv2d(x, w, prepared=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.mp_conv2d(x, w, prepared=True)
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            tune.tune([SMALL._replace(batch=3)])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, eager)
    conv_choice.forget()
