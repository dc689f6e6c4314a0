"""Every op that has a CUDA kernel, on a GPU: accuracy, layouts, streams, graphs, devices, size."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import edm2ext
from edm2ext import ops, reference

pytestmark = pytest.mark.gpu
if not (edm2ext.build_info()["cuda"] and torch.cuda.is_available()):
    pytest.skip(f"no GPU to test on: {edm2ext.build_info()['cuda_reason']}", allow_module_level=True)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    (2, 24, 5, 7),
    (3, 130, 1, 9),
    (1, 3, 33, 31),
    (2, 192, 16, 16),
    (4, 768, 8, 8),
    (1, 1032, 3, 3),
    (1, 2056, 2, 2),
    (2, 6, 2, 3, 5),
    (5, 16),
    (0, 4, 3, 3),
    (2, 8, 70, 70),
]


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with edm2ext.set_backend("native"):
        yield


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def _misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": _channels_last,
    "strided": _strided,
    "misaligned": _misaligned,
}
Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


class NativeCalls(TorchDispatchMode):
    """Collects the names of the native ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        if func.namespace == "edm2":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def randn(*shape: int, seed: int = 0) -> Tensor:
    """The same values on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def run(function: Function, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of the function, then gradients of its inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [out.detach() for out in outputs] + list(torch.autograd.grad(outputs, leaves, grads[: len(outputs)]))


def assert_accurate(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain torch in the same dtype, plus a rounding unit at the largest value."""
    assert got.shape == exact.shape
    assert got.dtype == plain.dtype
    if exact.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    unit = torch.finfo(got.dtype).eps * exact.abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + unit
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def compare(native: Function, plain: Function, inputs: list[Tensor], grads: list[Tensor], calls: set[str]) -> None:
    """Native against plain torch in the same dtype and in float64; `calls` are the native ops that must have run."""
    with NativeCalls() as seen:
        got = run(native, inputs, grads)
    assert set(seen.names) == {f"edm2::{name}" for name in calls}
    rounded = run(plain, inputs, grads)
    exact = run(plain, [x.double() for x in inputs], [g.double() for g in grads])
    for out, low, high in zip(got, rounded, exact, strict=True):
        assert_accurate(out, low, high)
    assert got[0].is_contiguous(memory_format=reference.memory_format(inputs[0]))


def gradients(x: Tensor, layout: str) -> list[Tensor]:
    """Two gradients like x, in a layout or expanded from one value."""
    if layout == "expanded":
        return [torch.full((1,) * x.dim(), 0.5 + i, device=x.device, dtype=x.dtype).expand(x.shape) for i in range(2)]
    return [LAYOUTS[layout](randn(*x.shape, seed=1 + i).to(x.dtype)) for i in range(2)]


LAYOUT_PAIRS = [("contiguous", "expanded"), ("channels_last", "contiguous"), ("channels_last", "expanded")]
LAYOUT_PAIRS += [("contiguous", "strided"), ("strided", "channels_last"), ("misaligned", "misaligned")]


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ops_match_reference(shape: tuple[int, ...], dtype: torch.dtype, layout: str, grad_layout: str):
    x = LAYOUTS[layout](randn(*shape).to(dtype))
    grads = gradients(x, grad_layout)
    compare(ops.pixel_norm, reference.pixel_norm, [x], grads, {"pixel_norm", "pixel_norm_backward"})
    compare(
        lambda x: ops.pixel_norm(x, silu=True),
        lambda x: reference.pixel_norm(x, silu=True),
        [x],
        grads,
        {"pixel_norm_silu", "pixel_norm_silu_backward"},
    )
    compare(ops.mp_silu, reference.mp_silu, [x], grads, {"mp_silu", "mp_silu_backward"})
    c = randn(*shape[:2], seed=3).to(dtype)
    calls = {"mp_silu_modulated", "mp_silu_modulated_backward"}
    compare(ops.mp_silu_modulated, reference.mp_silu_modulated, [x, c], grads, calls)


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_matches_reference(shape: tuple[int, ...], dtype: torch.dtype, layout: str, grad_layout: str):
    x, c = LAYOUTS[layout](randn(*shape).to(dtype)), randn(*shape[:2], seed=3).to(dtype)
    options = {"dropout": 0.3, "philox": torch.tensor([1 << 40, -5], device="cuda"), "subsequence": 12}
    compare(
        lambda x, c: ops.mp_silu_modulated(x, c, **options),
        lambda x, c: reference.mp_silu_modulated(x, c, **options),
        [x, c],
        gradients(x, grad_layout),
        {"mp_silu_modulated_dropout", "mp_silu_modulated_dropout_backward"},
    )


def test_dropout_in_a_graph_draws_anew_at_every_replay():
    x, c = _channels_last(randn(4, 192, 16, 16).half()), randn(4, 192).half()
    philox = torch.zeros(2, dtype=torch.int64, device="cuda")
    ops.mp_silu_modulated(x, c, 0.5, philox)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        philox.random_()
        y = ops.mp_silu_modulated(x, c, 0.5, philox)
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(y != 0)
        assert torch.equal(y, ops.mp_silu_modulated(x, c, 0.5, philox))
    assert 0.45 < (masks[0] == masks[1]).float().mean() < 0.55
    assert 0.45 < (masks[1] == masks[2]).float().mean() < 0.55


WEIGHTS = [(5, 7), (64, 128), (8, 3, 3, 3), (13, 5, 1, 1), (40, 64, 3, 3), (3, 1536, 3, 3), (2, 3584, 3, 3), (0, 4)]
WEIGHTS += [(2, 12288)]  # 48 KB of shared memory, which are granted unasked only to kernels that declare none


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_effective_weight(shape: tuple[int, ...], dtype: torch.dtype, layout: str):
    w, gain = LAYOUTS[layout](randn(*shape)), torch.tensor(0.7, device="cuda")
    grad = LAYOUTS[layout](randn(*shape, seed=1)).to(dtype)
    calls = {"effective_weight", "effective_weight_backward"}

    def weight_only(function: Function) -> Function:
        return lambda w: function(w, gain.to(w.dtype), dtype if w.dtype == torch.float32 else w.dtype)

    compare(weight_only(ops.effective_weight), weight_only(reference.effective_weight), [w], [grad], calls)
    low, calls = w.to(dtype), {"normalize_weight", "normalize_weight_backward"}
    compare(ops.normalize_weight, reference.normalize_weight, [low], [grad], calls)
    leaves = [w.detach().requires_grad_(), gain.clone().requires_grad_()]
    (grad_gain,) = torch.autograd.grad(ops.effective_weight(*leaves), leaves[1:], grad.float())
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    (truth,) = torch.autograd.grad(reference.effective_weight(*exact), exact[1:], grad.double())
    torch.testing.assert_close(grad_gain.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copies", [1, 120], ids=["one table", "two tables"])
@pytest.mark.parametrize("out_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("force", [False, True])
def test_prepare_weights(force: bool, dtype: torch.dtype, layout: str, out_layout: str, copies: int):
    shapes = WEIGHTS if copies == 1 else WEIGHTS[:4] * copies + WEIGHTS
    weights = [LAYOUTS[layout](randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    gains = [torch.tensor(0.1 + i, device="cuda") if i % 2 else None for i in range(len(weights))]
    expected_weights = [reference.normalize_weight(w) if force else w.clone() for w in weights]
    expected = [
        reference.effective_weight(w, 1 if g is None else g, dtype)
        for w, g in zip(expected_weights, gains, strict=True)
    ]
    out = [LAYOUTS[out_layout](torch.full_like(w, torch.nan, dtype=dtype)) for w in expected_weights]
    with NativeCalls() as seen:
        ops.prepare_weights(weights, gains, force=force, out=out)
    assert seen.names == (["edm2::prepare_weights"] if layout != "strided" or not force else [])
    torch.testing.assert_close(weights, expected_weights)
    # In float32 quotient, root and sum differ by some units each; gains make values of up to 100.
    torch.testing.assert_close(out, expected, rtol=max(2 * torch.finfo(dtype).eps, 1e-6), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_force_normalize(dtype: torch.dtype):
    weights = [randn(*shape, seed=i).to(dtype) for i, shape in enumerate(WEIGHTS)]
    expected = [reference.normalize_weight(w) for w in weights]
    ops.force_normalize_(weights)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filter", [(1, 1), (1, 3, 3, 1), (0.5, 1, -2, 1, 3, 0.25)])
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (3, 130, 2, 9), (2, 192, 16, 16), (2, 3, 31, 64), (0, 4, 4, 4)])
def test_resample(shape: tuple[int, ...], filter: tuple[float, ...], dtype: torch.dtype, layout: str, grad_layout: str):
    x = LAYOUTS[layout](randn(*shape).to(dtype))
    for name in ("resample_down", "resample_up"):
        function, plain = getattr(ops, name), getattr(reference, name)
        grad = gradients(torch.empty_like(plain(x, filter)), grad_layout)[0]
        compare(
            lambda x, f=function: f(x, filter),
            lambda x, f=plain: f(x, filter),
            [x],
            [grad],
            {name, f"{name}_backward"},
        )


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 24, 5, 7), (3, 130, 2, 9), (2, 192, 16, 16), (2, 3, 31, 64), (1, 1032, 4, 6), (1, 2056, 3, 4), (0, 4, 4, 4)],
    ids=str,
)
def test_resample_down_pixel_norm(shape: tuple[int, ...], dtype: torch.dtype, layout: str, grad_layout: str):
    x = LAYOUTS[layout](randn(*shape).to(dtype))
    grads = gradients(reference.resample_down(x), grad_layout)
    calls = {"resample_down_pixel_norm", "resample_down_pixel_norm_backward"}
    compare(ops.resample_down_pixel_norm, reference.resample_down_pixel_norm, [x], grads, calls)


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "shape"),
    [(2, (2, 384, 8, 8)), (3, (2, 576, 16, 16)), (2, (2, 120, 5, 7)), (1, (3, 15, 3, 3)), (2, (1, 12, 2, 3, 2))],
    ids=str,
)
def test_cosine_attention(heads: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str, grad_layout: str):
    """torch's fused attention rounds in other places than its plain products: twice their error is not enough."""
    x = LAYOUTS[layout](randn(*shape).to(dtype))
    grad = gradients(x[:, : shape[1] // 3], grad_layout)[0]
    with NativeCalls() as seen:
        got = run(lambda x: ops.cosine_attention(x, heads), [x], [grad])
    assert seen.names == ["edm2::qkv_norm", "edm2::qkv_norm_backward"]
    rounded, exact = (
        run(lambda x: reference.cosine_attention(x, heads), [x.to(kind)], [grad.to(kind)])
        for kind in (dtype, torch.float64)
    )
    for out, low, high in zip(got, rounded, exact, strict=True):
        error = (out.double() - high).abs().max().item()
        unit = torch.finfo(dtype).eps * high.abs().max().item()
        assert error <= 4 * (low.double() - high).abs().max().item() + 8 * unit
    assert got[0].is_contiguous(memory_format=reference.memory_format(x))


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "shape"), [(2, (2, 384, 8, 8)), (1, (1, 408, 3, 8)), (3, (2, 45, 5, 7))], ids=str)
def test_qkv_norm(heads: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str, grad_layout: str):
    qkv = LAYOUTS[layout](randn(*shape).to(dtype))
    n, depth = shape[0], shape[1] // (3 * heads)

    def plain(x: Tensor) -> list[Tensor]:
        parts = x.reshape(n, heads, depth, 3, -1).permute(3, 0, 1, 2, 4).flatten(1, 2)
        return [reference.pixel_norm(part).unflatten(0, (n, heads)).transpose(2, 3) for part in parts]

    leaf = {kind: qkv.to(kind).requires_grad_() for kind in (dtype, torch.float64)}
    expected = {kind: plain(x) for kind, x in leaf.items()}
    got = torch.ops.edm2.qkv_norm(qkv, heads, 1e-4)
    for j in range(3):
        assert_accurate(got[j], expected[dtype][j], expected[torch.float64][j])
        assert got[j].transpose(1, 2).is_contiguous()
    grads = [gradients(got[0], grad_layout)[j % 2] for j in range(3)]
    truths = {kind: torch.autograd.grad(y, leaf[kind], [g.to(kind) for g in grads])[0] for kind, y in expected.items()}
    found = torch.ops.edm2.qkv_norm_backward(*grads, qkv, heads, 1e-4)
    assert_accurate(found, truths[dtype], truths[torch.float64])


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_and_cat_match_reference(shape: tuple[int, ...], dtype: torch.dtype, layout: str, grad_layout: str):
    a, b = (randn(*shape, seed=i).to(dtype) for i in range(2))
    near = (reference.mp_sum(a.double(), b.double(), 0.3).abs() - 0.9).abs() < 0.02  # where rounding would decide
    a, b = (LAYOUTS[layout](x.masked_fill(near, 0)) for x in (a, b))
    grads = gradients(a, grad_layout)
    for clip in (None, 0.9):
        sums = [partial(module.mp_sum, t=0.3, clip=clip) for module in (ops, reference)]
        compare(*sums, [a, b], grads, {"mp_sum" if clip is None else "mp_sum_clipped", "mp_sum_backward"})
    for other in (b, LAYOUTS[layout](randn(shape[0], 5, *shape[2:], seed=2).to(dtype))):
        grads = gradients(torch.cat([a, other], dim=1), grad_layout)
        cats = [partial(module.mp_cat, t=0.3) for module in (ops, reference)]
        compare(*cats, [a, other], grads, {"mp_cat", "mp_cat_backward"})
        cats = [partial(module.mp_cat, t=0.3, silu=True) for module in (ops, reference)]
        compare(*cats, [a, other], grads, {"mp_cat_silu", "mp_cat_silu_backward"})


IMAGES = [(2, 4, 16, 16), (3, 3, 5, 7), (1, 1, 1, 1), (2, 31, 3, 9), (4, 4, 64, 64), (0, 4, 3, 3), (2, 3, 33, 31)]
LAYOUTS_OF_TWO = [("contiguous", "channels_last"), ("channels_last", "contiguous"), ("misaligned", "misaligned")]


@pytest.mark.parametrize(("layout", "f_layout"), LAYOUTS_OF_TWO)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_preconditioning_and_loss(shape: tuple[int, ...], dtype: torch.dtype, layout: str, f_layout: str):
    x, y = (LAYOUTS[layout](randn(*shape, seed=i)) for i in range(2))
    f = LAYOUTS[f_layout](randn(*shape, seed=2).to(dtype))
    sigma, u = randn(shape[0], seed=3).exp(), randn(shape[0], seed=4)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with NativeCalls() as seen:
            got = ops.precondition_input(x, sigma, 0.4, dtype, memory_format)
        assert seen.names == ["edm2::precondition_input"]
        plain = reference.precondition_input(x, sigma, 0.4, dtype, memory_format)
        assert_accurate(got, plain, reference.precondition_input(x.double(), sigma.double(), 0.4))
    for denoised in (ops.precondition_output, reference.precondition_output):
        assert denoised(x, f, sigma).dtype == torch.float32
    calls = {"precondition_output", "precondition_output_backward"}
    with NativeCalls() as seen:
        got = run(lambda f: ops.precondition_output(x, f, sigma, 0.4), [f], [y])
    assert set(seen.names) == {f"edm2::{name}" for name in calls}
    plain = run(lambda f: reference.precondition_output(x, f, sigma, 0.4), [f], [y])
    double = x.double(), sigma.double()
    exact = run(lambda f: reference.precondition_output(double[0], f, double[1], 0.4), [f.double()], [y.double()])
    for out, low, high in zip(got, plain, exact, strict=True):
        assert_accurate(out, low, high)
    inputs = [f, x, y, sigma, u]
    with NativeCalls() as seen:
        got = ops.denoising_loss(*inputs, 0.4, 0.7)
    assert seen.names == ["edm2::denoising_loss"]
    plain = reference.denoising_loss(*inputs, 0.4, 0.7)
    exact = reference.denoising_loss(*(t.double() for t in inputs), 0.4, 0.7)
    for out, low, high in zip(got, plain, exact, strict=True):
        assert_accurate(out, low, high)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_sampler_step(shape: tuple[int, ...], dtype: torch.dtype, layout: str):
    x, denoised, guide, start, noise = (LAYOUTS[layout](randn(*shape, seed=i)) for i in range(5))
    t_hat, t_next = torch.tensor([1.7, 1.1], device="cuda").unbind()
    heun = {"guide": guide, "guidance": 2.2, "start": start, "noise": noise, "churn": 0.3, "S_noise": 1.003}
    for options in ({}, heun):
        double = {name: v.double() if isinstance(v, Tensor) else v for name, v in options.items()}
        exact = reference.sampler_step(*(t.double() for t in (x, denoised, t_hat, t_next)), **double)
        plain = reference.sampler_step(x, denoised, t_hat, t_next, **options)
        network = ops.NetworkInput(0.4, dtype, torch.channels_last)
        with NativeCalls() as seen:
            out, x_in = ops.sampler_step(x, denoised, t_hat, t_next, **options, network=network)
        assert seen.names == ["edm2::sampler_step_input"]
        assert_accurate(out, plain, exact)
        sigma = t_next * (1 + options.get("churn", 0))
        expected = reference.precondition_input(plain, sigma, *network)
        assert_accurate(x_in, expected, reference.precondition_input(exact, sigma.double(), 0.4))
        assert torch.equal(ops.sampler_step(x, denoised, t_hat, t_next, **options)[0], out)


@pytest.mark.parametrize("bandwidth", [1.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (32, 192), (3, 33), (300, 5), (2, 5000)])
def test_mp_fourier(batch: int, channels: int, dtype: torch.dtype, bandwidth: float):
    inputs = [randn(batch).to(dtype), 6 * bandwidth * randn(channels, seed=1), 6 * randn(channels, seed=2)]
    grad = randn(batch, channels, seed=3).to(dtype)
    with NativeCalls() as seen:
        got = run(ops.mp_fourier, inputs, [grad])
    assert set(seen.names) == {"edm2::mp_fourier", "edm2::mp_fourier_backward"}
    rounded = run(reference.mp_fourier, inputs, [grad])
    exact = run(reference.mp_fourier, [x.double() for x in inputs], [grad.double()])
    for out, low, high in zip(got, rounded, exact, strict=True):
        assert_accurate(out, low, high)


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "shape"),
    [(1, 30, (3, 5, 7)), (8, 6, (1 << 16,)), (81, 3, (1001,)), (2, 8000, (33,)), (40, 40, (129, 3)), (3, 2, ())],
)
def test_accumulate_snapshots(inputs: int, outputs: int, shape: tuple[int, ...], compensated: bool):
    snapshots = [randn(*shape, seed=i).to(DTYPES[i % 3]) for i in range(inputs)]
    coefs = torch.randn(inputs, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = randn(outputs, *shape, seed=1000)
    exact = start.double() + torch.tensordot(coefs.T.cuda(), torch.stack([x.double() for x in snapshots]), dims=1)
    plain = reference.accumulate_snapshots(snapshots, coefs, start.clone(), compensated=compensated)
    with NativeCalls() as seen:
        assert_accurate(
            ops.accumulate_snapshots(snapshots, coefs, start.clone(), compensated=compensated), plain, exact
        )
        strided = torch.stack([start, start], dim=-1)[..., 0]
        assert_accurate(ops.accumulate_snapshots(snapshots, coefs, strided, compensated=compensated), plain, exact)
    assert seen.names.count("edm2::accumulate_snapshots_") == 2


def test_compensated_sums_are_rounded_once():
    snapshots = [randn(100_000, seed=i).half() for i in range(20)]
    coefs = 300 * torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    coefs[-1] -= coefs.sum(dim=0)
    exact = coefs.T.cuda() @ torch.stack([x.double() for x in snapshots])
    out = ops.accumulate_snapshots(snapshots, coefs, compensated=True)
    assert ((out.double() - exact).abs() <= 2**-23 * exact.abs()).all()


@pytest.mark.parametrize("buffer_bytes", [100, 1 << 20, 1 << 30])
def test_snapshots_stream_from_the_host(buffer_bytes: int, monkeypatch: pytest.MonkeyPatch):
    """Many pieces, on a stream that is still busy with what `out` starts from."""
    monkeypatch.setattr(sys.modules["edm2ext.ops.accumulate_snapshots"], "_BUFFER_BYTES", buffer_bytes)
    size = 5_000 if buffer_bytes < 1000 else 3_000_001
    snapshots = [randn(size, seed=i).to(DTYPES[i % 3]) for i in range(5)]
    coefs = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = randn(4, size, seed=9)
    expected = ops.accumulate_snapshots(snapshots, coefs, start.clone())
    on_host = [x.cpu() for x in snapshots]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        out = torch.zeros_like(start)
        torch.cuda._sleep(200_000_000)
        out += start
        result = ops.accumulate_snapshots(on_host, coefs, out)
        for x in on_host:  # no copy reads them any more
            x.zero_()
        assert result is out
        assert torch.equal(out, expected)


def test_zero_pixels():
    x = torch.zeros(1, 24, 4, 4, device="cuda", requires_grad=True)
    y = ops.pixel_norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e4))


def test_extreme_values():
    x = torch.tensor([0.0, 80.0, -80.0, 90.0, -90.0, 1e30, -1e30, torch.inf, torch.nan], device="cuda")
    torch.testing.assert_close(ops.mp_silu(x), reference.mp_silu(x), equal_nan=True)


@pytest.mark.parametrize("profiles", [1, 2, 33])
def test_ema_update(profiles: int):
    shapes = [(64, 32, 3, 3), (), (5,), (0,), (20001,), *[(3, i) for i in range(1, 120)]]
    params = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    params[0] = _channels_last(params[0])
    emas = [[randn(*p.shape, seed=1000 + k).as_strided(p.shape, p.stride()) for p in params] for k in range(profiles)]
    weights = [1.0, 0.3, *[1e-3 / (1 + k) for k in range(profiles)]][:profiles]
    with NativeCalls() as seen:
        exact = [
            [e.double().lerp(p.double(), w) for e, p in zip(es, params, strict=True)]
            for es, w in zip(emas, weights, strict=True)
        ]
        plain = [[e.lerp(p, w) for e, p in zip(es, params, strict=True)] for es, w in zip(emas, weights, strict=True)]
        ops.ema_update_(emas, params, weights)
    assert "edm2::ema_update_" in seen.names
    for got, low, high in zip(emas, plain, exact, strict=True):
        assert_accurate(*(torch.cat([t.reshape(-1) for t in tensors]) for tensors in (got, low, high)))
    assert torch.equal(emas[0][0], params[0])


def test_float64_takes_the_reference():
    x = torch.randn(2, 3, 4, 4, device="cuda", dtype=torch.float64)
    with NativeCalls() as seen:
        assert torch.equal(ops.pixel_norm(x), reference.pixel_norm(x))
    assert seen.names == []


def test_deterministic():
    x = _channels_last(randn(8, 200, 33, 31).half())
    c, grad = randn(8, 200).half(), _channels_last(randn(8, 200, 33, 31, seed=1).half())
    results = [torch.ops.edm2.mp_silu_modulated_backward(grad, x, c) for _ in range(5)]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    inputs = randn(999, 300), randn(999, seed=1), randn(300, seed=2), randn(300, seed=3)
    results = [torch.ops.edm2.mp_fourier_backward(*inputs) for _ in range(5)]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_runs_on_the_current_stream():
    x = torch.zeros(1 << 20, device="cuda")
    param, ema = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second: another stream would see zeros
        x.fill_(2)
        param.fill_(1)
        y = ops.mp_silu(x)
        ops.ema_update_([[ema]], [param], [0.5])
    stream.synchronize()
    torch.testing.assert_close(y, reference.mp_silu(torch.full_like(x, 2)))
    assert torch.equal(ema, torch.full_like(ema, 0.5))


def test_graph_capture():
    x = _channels_last(randn(4, 192, 16, 16).half())
    c, grad = randn(4, 192).half(), torch.ones_like(x)
    ema, param = torch.zeros(1000, device="cuda"), torch.ones(1000, device="cuda")
    coefs = torch.randn(2, 2, dtype=torch.float64)

    def work() -> list[Tensor]:
        y, silu = torch.ops.edm2.pixel_norm_silu(x, 1e-4)
        z = torch.ops.edm2.mp_silu_modulated(y, c)
        grad_y, grad_c = torch.ops.edm2.mp_silu_modulated_backward(grad, y, c)
        torch.ops.edm2.ema_update_([ema], [param], [0.5])
        summed, mask = torch.ops.edm2.mp_sum_clipped(x, y, 0.3, 1.0)
        cat, cat_silu = torch.ops.edm2.mp_cat_silu(summed, z, 0.5)
        grads = torch.ops.edm2.mp_cat_silu_backward(cat, cat_silu, cat, 192, 0.5)
        grads += torch.ops.edm2.mp_sum_backward(grads[0], None, mask, 0.3, True)
        total = torch.zeros(2, *c.shape, device="cuda")
        torch.ops.edm2.accumulate_snapshots_(total, [c, grad_c], coefs, True)
        grads += torch.ops.edm2.mp_fourier_backward(c, c[:, 0], param[:192], param[:192])
        return [silu, z, torch.ops.edm2.pixel_norm_silu_backward(grad_y, grad, x, 1e-4), grad_c, total, *grads]

    expected = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    ema.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    assert torch.equal(ema, torch.full_like(ema, 0.5))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_another_device():
    x = randn(2, 24, 5, 5).to("cuda:1").requires_grad_()
    assert torch.cuda.current_device() == 0
    y = ops.pixel_norm(x)
    y.sum().backward()
    assert y.device == x.grad.device == torch.device("cuda:1")
    torch.testing.assert_close(y, reference.pixel_norm(x))
    with pytest.raises(RuntimeError, match="expected a tensor on cuda:1, got one on cuda:0"):
        torch.ops.edm2.mp_silu_backward(y.detach().to("cuda:0"), x.detach())


def test_tensors_on_two_kinds_of_device():
    x = randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="mp_silu_modulated: c: expected a tensor on cuda:0"):
        torch.ops.edm2.mp_silu_modulated(x, torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="mp_silu_backward: grad: expected a tensor on cuda:0"):
        torch.ops.edm2.mp_silu_backward(torch.ones(2, 3, 4), x)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_more_than_two_to_the_31_elements(channels_last: bool):
    shape = (3, 64, 3345, 3345)  # 2.15e9
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("less than 20 GB of free GPU memory")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.full(shape, 0.5, device="cuda", dtype=torch.bfloat16).to(memory_format=layout)
    x[-1, :, -1, -1] = 2
    last = x[-1:, :, -1:, -5:].contiguous()
    for function, plain in ((ops.mp_silu, reference.mp_silu), (ops.pixel_norm, reference.pixel_norm)):
        y = function(x)
        torch.testing.assert_close(y[-1:, :, -1:, -5:], plain(last))
        del y
    y = ops.resample_down(x)
    assert torch.equal(y[-1], torch.full_like(y[-1], 0.5))  # 3345 is odd: the last row and column are dropped
    z = torch.ops.edm2.resample_down_backward(y, [1.0, 1.0], *shape[2:])
    assert z[-1, :, -2, -2].eq(0.125).all()
    assert z[-1, :, -1].count_nonzero() == 0
    del y, z
    c = torch.full(shape[:2], 3.0, device="cuda", dtype=torch.bfloat16)
    y = ops.mp_silu_modulated(x, c)
    torch.testing.assert_close(y[-1:, :, -1:, -5:], reference.mp_silu_modulated(last, c[-1:]))
    del y
    y = ops.mp_sum(x, x, 0.3, 1.5)
    torch.testing.assert_close(y[-1:, :, -1:, -5:], reference.mp_sum(last, last, 0.3, 1.5))
    y = ops.mp_cat(x, x[:, :8].contiguous(memory_format=layout))
    torch.testing.assert_close(y[-1:, :, -1:, -5:], reference.mp_cat(last, last[:, :8]))
