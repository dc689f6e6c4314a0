"""Effective weights made in advance: values and gradients are those of weights made on the spot."""

import pytest
import torch
from torch import Tensor

from edm2ext import nn, ops, reference

SHAPES = [(5, 7), (8, 3, 3, 3), (13, 5, 1, 1)]


def leaves(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype, requires_grad=True), torch.tensor(0.7, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_raw_gradients(backend: str, shape: tuple[int, ...]) -> None:
    w, gain = leaves(shape)
    grad = torch.randn(shape)
    effective = ops.effective_weight(w, gain).detach()
    made = ops.prepared_weight(w, effective, gain)
    assert torch.equal(made, effective)
    expected = torch.autograd.grad(reference.effective_weight(w, gain), (w, gain), grad)
    torch.testing.assert_close(torch.autograd.grad(made, (w, gain), grad), expected)


def test_number_as_gain(backend: str) -> None:
    w, _ = leaves((4, 3))
    made = ops.prepared_weight(w, ops.effective_weight(w, 0.5).detach(), 0.5)
    expected = torch.autograd.grad(reference.effective_weight(w, 0.5).square().sum(), w)
    torch.testing.assert_close(torch.autograd.grad(made.square().sum(), w), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_effective_gradients_pass_straight_through(backend: str, dtype: torch.dtype) -> None:
    w, gain = leaves((4, 3, 3, 3))
    effective = ops.effective_weight(w, gain, dtype).detach().contiguous(memory_format=torch.channels_last)
    made = ops.prepared_weight(w, effective, gain, gradients="effective")
    grad = torch.randn(w.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    found = torch.autograd.grad(made, (w, gain), grad, allow_unused=True)
    assert torch.equal(found[0], grad.float())
    assert backend == "reference" or found[0].is_contiguous()
    assert found[1] is None


def test_gradgradcheck(backend: str) -> None:
    w, gain = leaves((3, 4), torch.float64)
    effective = ops.effective_weight(w, gain).detach()

    def function(w: Tensor, gain: Tensor) -> Tensor:
        # The prepared value is a constant to finite differences: what is checked is the gradient as a function.
        value = ops.prepared_weight(w, effective, gain).square().sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, (w, gain), create_graph=True)])

    def direct(w: Tensor, gain: Tensor) -> Tensor:
        grad = 2 * effective
        found = torch.autograd.grad(reference.effective_weight(w, gain), (w, gain), grad, create_graph=True)
        return torch.cat([g.flatten() for g in found])

    torch.testing.assert_close(function(w, gain), direct(w, gain))
    for index in (0, 1):
        got = torch.autograd.grad(function(w, gain).sum(), (w, gain)[index])[0]
        # d/dw of the gradient holds the incoming 2 * prepared(w, gain) too, which depends on w and gain itself.
        value = reference.effective_weight(w, gain)
        found = torch.autograd.grad(value, (w, gain), 2 * value, create_graph=True)
        want = torch.autograd.grad(sum(g.sum() for g in found), (w, gain)[index])[0]
        torch.testing.assert_close(got, want)


def test_bad_arguments() -> None:
    w, gain = leaves((4, 3))
    with pytest.raises(ValueError, match=r"effective must have w's shape \[4, 3\], got \[3, 4\]"):
        ops.prepared_weight(w, torch.ones(3, 4), gain)
    with pytest.raises(ValueError, match="gradients must be 'raw' or 'effective', got 'both'"):
        ops.prepared_weight(w, w, gain, gradients="both")  # type: ignore[arg-type]


def test_layers_use_what_was_prepared(backend: str) -> None:
    """Same outputs and gradients as layer by layer; forced normalisation once, for all."""
    torch.manual_seed(1)
    module = torch.nn.ModuleList([nn.MPConv(3, 8, 3), nn.MPLinear(8, 4)])
    gain = torch.nn.Parameter(torch.tensor(0.3))
    x = torch.randn(2, 3, 5, 5)

    def run() -> tuple[Tensor, ...]:
        y = module[1](module[0](x).mean((2, 3)), gain=gain)
        return y, *torch.autograd.grad(y.square().sum(), (*module.parameters(), gain))

    before = [p.detach().clone() for p in module.parameters()]
    expected = run()
    after = [p.detach().clone() for p in module.parameters()]
    for parameter, value in zip(module.parameters(), before, strict=True):
        parameter.data.copy_(value)
    prepared = nn.PreparedWeights(module, {module[1]: gain})
    prepared.refresh(force=True)
    with prepared:
        found = run()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([p.detach() for p in module.parameters()], after)
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)  # layer by layer again, normalised once more


def test_another_gain_is_refused() -> None:
    layer = nn.MPLinear(3, 4)
    with nn.PreparedWeights(layer), pytest.raises(ValueError, match="prepared with another gain"):
        layer(torch.ones(1, 3), gain=2.0)


def test_stale_weights_are_noticed_in_backward() -> None:
    layer = nn.MPConv(3, 4, 3)
    prepared = nn.PreparedWeights(layer)
    with prepared:
        y = layer(torch.ones(1, 3, 4, 4, requires_grad=True))
        prepared.refresh(force=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
