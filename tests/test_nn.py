"""MPConv, MPLinear, MPFourier and the switch of forced normalisation."""

import contextlib
import math
import subprocess
import sys

import pytest
import torch

from edm2ext import nn, ops
from edm2ext.nn import MPConv, MPFourier, MPLinear, force_normalization


def test_official_names_and_initial_values() -> None:
    conv, linear, fourier = MPConv(6, 8, 3, groups=2), MPLinear(5, 7), MPFourier(2000, bandwidth=2)
    assert {k: v.shape for k, v in conv.state_dict().items()} == {"weight": (8, 3, 3, 3)}
    assert {k: v.shape for k, v in linear.state_dict().items()} == {"weight": (7, 5)}
    assert list(fourier.state_dict()) == ["freqs", "phases"]
    assert list(fourier.parameters()) == []
    assert fourier.freqs.std().item() == pytest.approx(4 * math.pi, rel=0.1)
    assert 0 <= fourier.phases.min() < fourier.phases.max() < 2 * math.pi


def test_fourier_draws_the_normal_numbers_first() -> None:
    torch.manual_seed(1)
    fourier = MPFourier(5)
    torch.manual_seed(1)
    assert torch.equal(fourier.freqs, 2 * math.pi * torch.randn(5))
    assert torch.equal(fourier.phases, 2 * math.pi * torch.rand(5))


def test_layers_are_magnitude_preserving(backend: str) -> None:
    x = torch.randn(64, 32, 8, 8)
    for out in (MPConv(32, 64, 3)(x)[..., 1:-1, 1:-1], MPLinear(32, 64)(x[..., 0, 0]), MPFourier(64)(x[:, 0, 0, 0])):
        assert out.square().mean().sqrt().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    "layer", [MPConv(3, 4, 3), MPConv(3, 4, 3, stride=2), MPConv(3, 6, 1, groups=3), MPConv(3, 4, 3, dilation=2)]
)
def test_conv_is_mp_conv2d(backend: str, layer: MPConv) -> None:
    layer.eval()
    x, gain = torch.randn(2, 3, 7, 8), torch.tensor(0.6)
    expected = ops.mp_conv2d(x, layer.weight, gain, stride=layer.stride, dilation=layer.dilation, groups=layer.groups)
    assert torch.equal(layer(x, gain), expected)


@pytest.mark.parametrize("layer", [MPConv(5, 4, 1), MPConv(5, 4, 3, stride=2), MPConv(6, 4, 3, groups=2)])
@pytest.mark.parametrize("prepared", [False, True])
def test_conv_of_a_concatenation(backend: str, layer: MPConv, prepared: bool) -> None:
    layer.eval()
    a, b = torch.randn(2, 3, 7, 8), torch.randn(2, layer.weight.shape[1] * layer.groups - 3, 7, 8)
    x, x_silu = ops.mp_cat(a, b, 0.3, silu=True)
    with nn.PreparedWeights(layer) if prepared else contextlib.nullcontext():
        y, same = layer(a, first=ops.CatWith(b, 0.3))
        assert torch.equal(y, layer(x))
        assert torch.equal(same, x_silu)
        with pytest.raises(ValueError, match="MPConv: either `then` or `first` must be None"):
            layer(a, first=ops.CatWith(b), then=ops.ModulatedSiLU(torch.ones(2, 4)))


def _changes_weight(layer: MPConv | MPLinear, x: torch.Tensor) -> bool:
    with torch.no_grad():
        layer.weight.normal_().mul_(3)
    before = layer.weight.detach().clone()
    layer(x)
    changed = not torch.equal(layer.weight, before)
    if changed:
        torch.testing.assert_close(layer.weight.detach(), ops.normalize_weight(before))
    return changed


@pytest.mark.parametrize(
    ("layer", "x"), [(MPConv(3, 4, 3), torch.randn(1, 3, 4, 4)), (MPLinear(3, 4), torch.randn(2, 3))]
)
def test_forced_normalisation(backend: str, layer: MPConv | MPLinear, x: torch.Tensor) -> None:
    layer.train()
    assert _changes_weight(layer, x)
    with torch.no_grad():
        assert not _changes_weight(layer, x)
    with force_normalization("step"):
        assert not _changes_weight(layer, x)
        with force_normalization("forward"):
            assert _changes_weight(layer, x)
        assert not _changes_weight(layer, x)
    with force_normalization("off"):
        assert not _changes_weight(layer, x)
    layer.eval()
    assert not _changes_weight(layer, x)


def test_switch_as_a_function() -> None:
    try:
        force_normalization("step")
        assert not nn.forces_in_forward(training=True)
    finally:
        force_normalization("forward")
    assert nn.forces_in_forward(training=True)
    with pytest.raises(ValueError, match="force_normalization: mode must be one of forward, step, off, got 'on'"):
        force_normalization("on")
    assert nn.forces_in_forward(training=True)


def test_gradient_is_taken_at_the_normalised_weight(backend: str) -> None:
    layer, x = MPLinear(5, 3), torch.randn(4, 5)
    layer(x).square().sum().backward()
    w = layer.weight.detach().clone().requires_grad_()
    ops.mp_linear(x, w).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, w.grad)


def test_calling_twice_before_backward_is_noticed(backend: str) -> None:
    """The second call overwrites what the first one's backward pass needs."""
    layer, x = MPLinear(5, 3), torch.randn(4, 5)
    total = layer(x).sum() + layer(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    with force_normalization("off"):
        (layer(x).sum() + layer(x).sum()).backward()


def test_layers_on_the_meta_device_and_in_half_precision(backend: str) -> None:
    with torch.device("meta"):
        conv, linear, fourier = MPConv(3, 4, 3), MPLinear(3, 4), MPFourier(6)
        assert conv(torch.empty(2, 3, 5, 5)).shape == (2, 4, 5, 5)
        assert linear(torch.empty(2, 3)).shape == (2, 4)
        assert fourier(torch.empty(2)).shape == (2, 6)
    half = MPConv(3, 4, 3).half().eval()
    assert half(torch.randn(1, 3, 4, 4, dtype=torch.float16)).dtype == torch.float16
    assert half(torch.randn(1, 3, 4, 4)).dtype == torch.float32


def test_bad_groups() -> None:
    with pytest.raises(ValueError, match="MPConv: groups must divide in_channels=3 and out_channels=4, got 2"):
        MPConv(3, 4, 3, groups=2)


def test_networks_without_values_are_made_at_once() -> None:
    """Arithmetic on the device "meta" imports compilers, which took four seconds of every command."""
    code = """
import sys, torch, edm2ext.nn
with torch.device("meta"):
    net = torch.nn.ModuleList([edm2ext.nn.MPConv(4, 4, 3), edm2ext.nn.MPLinear(4, 4), edm2ext.nn.MPFourier(4)])
assert all(value.is_meta for value in net.state_dict().values())
assert "sympy" not in sys.modules, "compilers were imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_are_those_of_randn() -> None:
    torch.manual_seed(0)
    conv, linear = MPConv(4, 2, 3), MPLinear(3, 5)
    torch.manual_seed(0)
    assert torch.equal(conv.weight, torch.randn(2, 4, 3, 3))
    assert torch.equal(linear.weight, torch.randn(5, 3))
