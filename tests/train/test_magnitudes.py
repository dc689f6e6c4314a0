"""Magnitudes of activations and weights by resolution."""

import math

import pytest
import torch

from edm2ext import reference
from python_train import magnitudes
from python_train.network import Precond


@pytest.fixture
def net() -> Precond:
    torch.manual_seed(0)
    net = Precond(8, 1, 10, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.5)
    return net.eval()


def measured(net: Precond) -> dict[str, magnitudes.Bucket]:
    torch.manual_seed(1)
    sigma = torch.rand(16) + 0.1
    x = torch.randn(16, 1, 8, 8) * (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
    return {b.name: b for b in magnitudes.measure(net, x, sigma, torch.eye(10)[torch.arange(16) % 10])}


def test_every_layer_of_the_blocks_is_in_its_bucket(net: Precond) -> None:
    buckets = measured(net)
    assert list(buckets) == ["Enc 8", "Enc 4", "Dec 4", "Dec 8"]
    names = [m.layer for bucket in buckets.values() for m in bucket.weights]
    assert names == [m.layer for bucket in buckets.values() for m in bucket.activations]
    weights = [name for name, p in net.unet.named_parameters(prefix="unet") if "block" in name and p.ndim]
    expected = [name.removesuffix(".weight") for name in weights]
    assert set(expected) < set(names)  # and those of the blocks that change the resolution
    assert "unet.enc.8x8_conv" not in names


def test_a_network_at_initialisation_has_unit_magnitudes(net: Precond) -> None:
    for bucket in measured(net).values():
        for m in bucket.weights:
            assert m.mean == pytest.approx(1, abs=0.1)
        for m in bucket.activations:
            gain = 0.5 if m.layer.endswith("emb_linear") else 1.0
            assert 0.4 < m.mean / gain < 1.6, m.layer  # the zeros around images of 4x4 pixels cost a part
    assert not magnitudes.drifting(list(measured(net).values()))


@pytest.mark.parametrize("name", ["conv_res0", "conv_res1", "attn_proj"])
def test_layers_are_measured_before_what_is_fused_to_them(net: Precond, name: str) -> None:
    inputs = []
    layer = getattr(net.unet.dec["4x4_in0"], name)
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    bucket = measured(net)["Dec 4"]
    handle.remove()
    rms = reference.mp_conv2d(inputs[0], layer.weight.detach()).square().mean(dim=(0, 2, 3)).sqrt()
    [found] = [m for m in bucket.activations if m.layer == f"unet.dec.4x4_in0.{name}"]
    assert (found.mean, found.max) == pytest.approx((float(rms.mean()), float(rms.max())), rel=1e-5)
    assert not layer._forward_hooks  # its own are gone


def test_the_skip_connection_is_measured_before_the_residual_branch(net: Precond) -> None:
    """Its layer returns MP-SiLU of the concatenation too."""
    inputs = []
    layer = net.unet.dec["8x8_block0"].conv_skip
    handle = layer.register_forward_pre_hook(
        lambda _, args, options: inputs.append((args[0], options["first"])), with_kwargs=True
    )
    bucket = measured(net)["Dec 8"]
    handle.remove()
    (x, cat) = inputs[0]
    y, _ = reference.mp_cat_conv2d(x, cat.b, layer.weight.detach(), t=cat.t)
    rms = y.square().mean(dim=(0, 2, 3)).sqrt()
    [found] = [m for m in bucket.activations if m.layer == "unet.dec.8x8_block0.conv_skip"]
    assert (found.mean, found.max) == pytest.approx((float(rms.mean()), float(rms.max())), rel=1e-5)


def test_clipped_values_are_counted(net: Precond) -> None:
    stats = magnitudes.as_stats(list(measured(net).values()))
    assert stats["Magnitude/Dec 8/clipped"] == 0
    block = net.unet.dec["8x8_block0"]
    outputs = []
    block.register_forward_hook(lambda _, __, y: outputs.append(y))
    block.clip_act = 1.0
    stats = magnitudes.as_stats(list(measured(net).values()))
    fraction = float((outputs[0].abs() == 1).float().mean())
    assert stats["Magnitude/Dec 8/clipped"] == pytest.approx(fraction, rel=1e-6)
    assert 0.1 < fraction < 0.9


def test_drift_names_the_layer(net: Precond) -> None:
    net.unet.enc["4x4_block0"].conv_res0.weight.data[3] *= 7
    net.unet.enc["4x4_block0"].conv_skip.weight.data.fill_(math.nan)
    lines = magnitudes.drifting(list(measured(net).values()))
    block = "unet.enc.4x4_block0"
    assert lines[f"{block}.conv_res0"].startswith(f"weights of {block}.conv_res0 have rows of magnitude 7")
    assert lines[f"{block}.conv_skip"] == f"weights of {block}.conv_skip have rows of magnitude nan (kept at 1)"
    assert lines[f"{block}.conv_res1"] == f"activations of {block}.conv_res1 reach magnitude nan (about 1 expected)"


def test_statistics(net: Precond) -> None:
    stats = magnitudes.as_stats(list(measured(net).values()))
    assert len(stats) == 4 * (2 * 2 + 1)
    assert 0.8 < stats["Magnitude/Enc 8/weights_mean"] < stats["Magnitude/Enc 8/weights_max"] < 1.5
