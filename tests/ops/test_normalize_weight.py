"""Weight normalisation, effective weights (single and in lists) and forced normalisation."""

from collections.abc import Callable

import pytest
import torch
from op_testing import DTYPES, LAYOUTS, assert_accurate, compare
from torch import Tensor

import edm2ext
from edm2ext import ops, reference

SHAPES = [(5, 7), (64, 1), (8, 3, 3, 3), (13, 5, 1, 1), (40, 24, 3, 3), (30, 4700)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare("normalize_weight", [torch.randn(shape) * 2], dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("expanded_grad", [False, True])
def test_normalize_layouts(layout: str, expanded_grad: bool) -> None:
    compare("normalize_weight", [torch.randn(6, 5, 3, 3)], layout=layout, expanded_grad=expanded_grad)


def test_normalize_small_magnitudes() -> None:
    compare("normalize_weight", [torch.randn(6, 5, 3, 3) * 1e-5])
    compare("normalize_weight", [torch.randn(6, 5)], eps=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_effective_weight_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare("effective_weight", [torch.randn(shape)], dtype=dtype, gain=torch.tensor(0.7))


@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_gain(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, gain_dtype: torch.dtype
) -> None:
    w, gain = torch.randn(shape, dtype=dtype), torch.tensor(0.7, dtype=gain_dtype, requires_grad=True)
    grad = torch.randn(shape, dtype=dtype)
    ops.effective_weight(w, gain).backward(grad)
    per_row = (grad.double() * reference.normalize_weight(w.double())).flatten(1).mean(1)
    expected = (per_row.sum() * w[0].numel() ** 0.5).to(gain_dtype)
    tolerance = max(1e-5, 2 * torch.finfo(gain_dtype).eps)
    torch.testing.assert_close(gain.grad, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("expanded_grad", [False, True])
def test_effective_weight_layouts(layout: str, expanded_grad: bool) -> None:
    inputs = [torch.randn(6, 5, 3, 3)]
    compare("effective_weight", inputs, layout=layout, expanded_grad=expanded_grad, gain=1.3)


@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_effective_weight_cast(w_dtype: torch.dtype, dtype: torch.dtype) -> None:
    w, gain = torch.randn(6, 5, 3, 3, dtype=w_dtype), torch.tensor(0.7)
    grad = torch.randn(6, 5, 3, 3, dtype=dtype)

    def run(function: Callable[..., Tensor], w: Tensor, gain: Tensor, dtype: torch.dtype, grad: Tensor) -> list[Tensor]:
        w, gain = w.clone().requires_grad_(), gain.clone().requires_grad_()
        out = function(w, gain, dtype)
        return [out, *torch.autograd.grad(out, (w, gain), grad)]

    with edm2ext.set_backend("native"):
        native = run(ops.effective_weight, w, gain, dtype, grad)
    plain = run(reference.effective_weight, w, gain, dtype, grad)
    exact = run(reference.effective_weight, w.double(), gain.double(), torch.float64, grad.double())
    assert [x.dtype for x in native] == [dtype, w_dtype, torch.float32]
    for got, same_dtype, truth in zip(native, plain, exact, strict=True):
        assert_accurate(got, same_dtype, truth)


@pytest.mark.parametrize("gain", [2.0, 0, torch.tensor(0.5)])
def test_number_and_tensor_gains_agree(backend: str, gain: "float | Tensor") -> None:
    w = torch.randn(6, 5)
    torch.testing.assert_close(ops.effective_weight(w, gain), ops.effective_weight(w) * gain)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_list_is_each_of_its_members(backend: str, dtype: torch.dtype | None) -> None:
    weights = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    gains = [torch.tensor(0.5 + i, requires_grad=True) if i % 2 else 2 for i in range(len(weights))]
    tensors = weights + [gain for gain in gains if isinstance(gain, Tensor)]
    together = ops.effective_weight(weights, gains, dtype)
    one_by_one = [ops.effective_weight(w, gain, dtype) for w, gain in zip(weights, gains, strict=True)]
    grads = [torch.randn_like(out) for out in together]
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=0)
    got, expected = (torch.autograd.grad(outs, tensors, grads) for outs in (together, one_by_one))
    torch.testing.assert_close(got, expected)


def test_list_of_one_gain_and_mixed_dtypes(backend: str) -> None:
    weights = [torch.randn(3, 4), torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 3)[:, ::2]]
    together = ops.effective_weight(weights, 0.5)
    assert [w.dtype for w in together] == [torch.float32, torch.float64, torch.float32]
    for got, w in zip(together, weights, strict=True):
        torch.testing.assert_close(got, reference.effective_weight(w, 0.5))
    assert ops.effective_weight([], []) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_forced_normalisation(backend: str, dtype: torch.dtype, layout: str) -> None:
    weights = [LAYOUTS[layout](torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    expected = [ops.normalize_weight(w) for w in weights]
    pointers = [w.data_ptr() for w in weights]
    ops.force_normalize_(weights)
    torch.testing.assert_close(weights, expected)
    assert [w.data_ptr() for w in weights] == pointers


def test_forced_normalisation_of_parameters_leaves_no_graph(backend: str) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6))
    ops.force_normalize_(weight)
    assert weight.is_leaf
    assert weight.requires_grad
    torch.testing.assert_close(weight.detach().square().mean(1), torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_forced_normalisation_between_forward_and_backward_is_noticed(backend: str, layout: str) -> None:
    weight = LAYOUTS[layout](torch.randn(4, 6)).requires_grad_()
    out = ops.effective_weight(weight)
    ops.force_normalize_([weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_forced_normalisation_of_a_list_with_mixed_dtypes_and_layouts(backend: str) -> None:
    weights = [torch.randn(3, 4), torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 8)[:, ::2]]
    expected = [reference.normalize_weight(w) for w in weights]
    ops.force_normalize_(weights)
    torch.testing.assert_close(weights, expected)


PREPARED_SHAPES = [(5, 7), (8, 3, 3, 3), (13, 5, 1, 1), (40, 24, 3, 3), (3, 530), (0, 4)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("force", [False, True])
def test_preparation(
    backend: str, force: bool, layout: str, out_dtype: torch.dtype | None, memory_format: torch.memory_format
) -> None:
    weights = [LAYOUTS[layout](torch.randn(shape)) for shape in PREPARED_SHAPES]
    gains = [torch.tensor(0.3 * i, dtype=torch.float16) if i % 2 else None for i in range(len(weights))]
    raw = [LAYOUTS[layout](w.clone()) for w in weights]
    versions = [w._version for w in weights]
    out = ops.prepare_weights(weights, gains, out_dtype, force=force, memory_format=memory_format)
    for w, before, version, gain, prepared in zip(weights, raw, versions, gains, out, strict=True):
        exact_w, plain_w = (reference.normalize_weight(x) if force else x for x in (before.double(), before))
        factor = 1 if gain is None else gain
        plain = reference.effective_weight(plain_w, factor, out_dtype)
        assert_accurate(prepared, plain, reference.effective_weight(exact_w, factor), units=2)
        assert prepared.dtype == (out_dtype or torch.float32)
        assert prepared.is_contiguous(memory_format=memory_format if w.dim() == 4 else torch.contiguous_format)
        if force:
            assert_accurate(w, plain_w, exact_w, units=2)
            assert w._version > version
        else:
            assert torch.equal(w, before)
            assert w._version == version


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_preparation_into_given_tensors(backend: str, layout: str) -> None:
    weights = [torch.randn(4, 6, 3, 3, requires_grad=True), torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 3)]
    out = [LAYOUTS[layout](torch.zeros(w.shape, dtype=torch.bfloat16)) for w in weights[:2]] + [torch.zeros(2, 3)]
    gain = torch.tensor(0.7, requires_grad=True)
    version = out[0]._version
    assert ops.prepare_weights(weights, [gain, None, None], out=out)[0] is out[0]
    assert not out[0].requires_grad
    assert out[0]._version > version
    for w, g, prepared in zip(weights, (0.7, 1, 1), out, strict=True):
        torch.testing.assert_close(prepared, reference.effective_weight(w.detach(), g, prepared.dtype))
    assert ops.prepare_weights([]) == []


def test_preparation_between_forward_and_backward_is_noticed(backend: str) -> None:
    (prepared,) = ops.prepare_weights([torch.randn(4, 6)])
    prepared.requires_grad_()
    out = prepared.square()
    with torch.no_grad():
        ops.prepare_weights([torch.randn(4, 6)], out=[prepared])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_preparation_of_bad_input(backend: str) -> None:
    w = torch.randn(3, 4)
    before = w.clone()
    for message, call in {
        r"weights must be \[out, in, ...\], got shape \[3\]": lambda: ops.prepare_weights([w, w[:, 0]], force=True),
        r"gains must have one entry per weight \(1\), got 2": lambda: ops.prepare_weights([w], [None, None]),
        "gains must be 0-dim tensors or None, got float": lambda: ops.prepare_weights([w], [0.5]),
        "gain must be a number or a 0-dim": lambda: ops.prepare_weights([w], [w]),
        r"out\[0\] must be \[3, 4\] on cpu, got \[4, 3\]": lambda: ops.prepare_weights([w], out=[w.t()], force=True),
        r"out must have one entry per weight": lambda: ops.prepare_weights([w], out=[], force=True),
        "memory_format must be": lambda: ops.prepare_weights([w], memory_format=torch.preserve_format, force=True),
    }.items():
        with pytest.raises((ValueError, TypeError), match=f"prepare_weights: {message}"):
            call()
    assert torch.equal(w, before)


def test_bad_input(backend: str) -> None:
    good = torch.randn(3, 4)
    before = good.clone()
    for function in (ops.normalize_weight, ops.effective_weight, ops.force_normalize_):
        with pytest.raises(ValueError, match=rf"{function.__name__}: w must be \[out, in, ...\], got shape \[3\]"):
            function(torch.randn(3))
        with pytest.raises(ValueError, match=f"{function.__name__}: w must have a fan-in of at least 1"):
            function(torch.randn(3, 0))
    for function in (ops.normalize_weight, ops.force_normalize_):
        with pytest.raises(ValueError, match=f"{function.__name__}: eps must be positive, got -1"):
            function(torch.randn(3, 4), eps=-1)
    with pytest.raises(ValueError, match="force_normalize_: w must be"):
        ops.force_normalize_([good, torch.randn(3)])
    assert torch.equal(good, before)
    with pytest.raises(ValueError, match=r"effective_weight: gain must be a number or a 0-dim .* shape \[1\]"):
        ops.effective_weight(good, torch.ones(1))
    with pytest.raises(TypeError, match="effective_weight: gain must be a number or a 0-dim tensor, got str"):
        ops.effective_weight(good, "1")
    with pytest.raises(ValueError, match=r"effective_weight: gain must have one entry per weight \(2\), got 1"):
        ops.effective_weight([good, good], [1.0])
