"""FusedAdam against torch.optim.Adam, PowerEMA and force_normalize_ one after the other."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from edm2ext import ops, reference
from edm2ext.nn import MPConv, MPLinear, force_normalization
from edm2ext.optim import FusedAdam, LossScale
from edm2ext.phema import PowerEMA, power_beta

SIGMA_RELS = (0.05, 0.1)
BATCH = 64


class Net(nn.Module):
    """Both kinds of layers, a gain of each, a parameter that is neither, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = MPConv(3, 8, 3)
        self.out = MPConv(8, 5, 1)
        self.linear = MPLinear(5, 700)
        self.out_gain = nn.Parameter(torch.tensor(0.3))
        self.linear_gain = nn.Parameter(torch.tensor(0.0))
        self.bias = nn.Parameter(torch.randn(700))
        self.unused = nn.Parameter(torch.randn(3, 2))

    @property
    def gains(self) -> dict[nn.Parameter, nn.Parameter]:
        return {self.out.weight: self.out_gain, self.linear.weight: self.linear_gain}

    @property
    def weights(self) -> list[nn.Parameter]:
        return [self.conv.weight, self.out.weight, self.linear.weight]

    def forward(self, x: Tensor) -> Tensor:
        x = ops.mp_silu(self.conv(x))
        x = self.out(x, self.out_gain).mean(dim=(2, 3))
        return self.linear(x, self.linear_gain) + self.bias * 0.1

    def with_effective(self, x: Tensor, conv: Tensor, out: Tensor, linear: Tensor) -> Tensor:
        x = ops.mp_silu(ops.mp_conv2d(x, conv, prepared=True))
        x = ops.mp_conv2d(x, out, prepared=True).mean(dim=(2, 3))
        return ops.mp_linear(x, linear, prepared=True) + self.bias * 0.1


def data(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3, 6, 6), (4, 700)))
    return x.to(dtype), y.to(dtype)


def one_minus_betas(step: int) -> list[float]:
    return (1 - power_beta((step + 1) * BATCH, BATCH, SIGMA_RELS)).tolist()


def raw_gradients(net: Net, step: int, scale: "Tensor | float" = 1) -> None:
    x, y = data(step, net.bias.dtype)
    ((net(x) - y).square().sum() * scale).backward()


def effective_gradients(net: Net, prepared: list[Tensor], step: int) -> None:
    """As a loop would: the effective weights' gradients become the weights'."""
    leaves = [p.detach().to(net.bias.dtype).requires_grad_() for p in prepared]
    x, y = data(step, net.bias.dtype)
    (net.with_effective(x, *leaves) - y).square().sum().backward()
    for weight, leaf in zip(net.weights, leaves, strict=True):
        weight.grad = leaf.grad


def train_apart(net: Net, steps: int, lr: float) -> PowerEMA:
    """Adam, averages and normalisation one after the other."""
    adam = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99))
    ema = PowerEMA(net.parameters(), SIGMA_RELS)
    with force_normalization("off"):
        ops.force_normalize_(net.weights)
        for step in range(steps):
            raw_gradients(net, step)
            adam.step()
            adam.zero_grad()
            ema.update((step + 1) * BATCH, BATCH)
            ops.force_normalize_(net.weights)
    return ema


def train_fused(
    net: Net, steps: int, lr: float, gradients: str
) -> tuple[FusedAdam, PowerEMA, dict[nn.Parameter, Tensor]]:
    """The same with FusedAdam; returns it, the averages, and the effective weights."""
    ema = PowerEMA(net.parameters(), SIGMA_RELS)
    prepared = {w: torch.empty_like(w, requires_grad=False) for w in net.weights}
    optimizer = FusedAdam(
        net, lr, gains=net.gains, gradients=gradients, ema=ema, force_normalize=True, prepared=prepared
    )
    optimizer.prepare()
    with force_normalization("off"):
        for step in range(steps):
            if gradients == "raw":
                raw_gradients(net, step)
            else:
                effective_gradients(net, list(prepared.values()), step)
            optimizer.step(one_minus_betas(step))
            optimizer.zero_grad()
    return optimizer, ema, prepared


def assert_nets_close(net: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for (name, got), truth in zip(net.named_parameters(), expected.parameters(), strict=True):
        error = (got - truth).norm() / truth.norm().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradients", ["raw", "effective"])
def test_same_as_one_after_the_other(backend: str, gradients: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    apart = Net().to(dtype)
    fused = copy.deepcopy(apart)
    expected_ema = train_apart(apart, 5, 0.02)
    _, ema, prepared = train_fused(fused, 5, 0.02, gradients)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    assert_nets_close(fused, apart, tolerance)
    for profile, expected in zip(ema.profiles, expected_ema.profiles, strict=True):
        for got, truth in zip(profile, expected, strict=True):
            assert (got - truth).norm() <= tolerance * truth.norm().clamp_min(1e-3)
    for weight, target in prepared.items():
        exact = reference.effective_weight(weight.detach(), fused.gains.get(weight, torch.tensor(1.0)).detach())
        torch.testing.assert_close(target, exact)


@pytest.mark.parametrize("gradients", ["raw", "effective"])
def test_low_precision_effective_weights_in_another_layout(backend: str, gradients: str) -> None:
    net = Net()
    prepared = {
        w: torch.zeros(w.shape, dtype=torch.bfloat16).to(
            memory_format=torch.channels_last if w.dim() == 4 else torch.contiguous_format
        )
        for w in net.weights
    }
    prepared[net.linear.weight] = torch.zeros(700, 5)
    optimizer = FusedAdam(net, 0.01, gains=net.gains, gradients=gradients, force_normalize=True, prepared=prepared)
    optimizer.prepare()
    for step in range(2):
        effective_gradients(net, list(prepared.values()), step) if gradients == "effective" else raw_gradients(
            net, step
        )
        versions = [target._version for target in prepared.values()]
        optimizer.step()
        optimizer.zero_grad()
        assert all(t._version > v for t, v in zip(prepared.values(), versions, strict=True))
        for weight, target in prepared.items():
            gain = net.gains[weight].detach() if weight in net.gains else 1
            torch.testing.assert_close(target, reference.effective_weight(weight.detach(), gain, target.dtype))
            torch.testing.assert_close(
                weight.detach(), reference.normalize_weight(weight.detach()), rtol=1e-6, atol=1e-6
            )


def test_channels_last_parameters(backend: str) -> None:
    torch.manual_seed(0)
    nets = [Net() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].to(memory_format=torch.channels_last)
    for net in nets:
        train_fused(net, 3, 0.02, "effective")
    assert not nets[1].conv.weight.is_contiguous()
    assert_nets_close(nets[1], nets[0], 2e-6)


def test_step_mode_agrees_with_forward_mode(backend: str) -> None:
    torch.manual_seed(0)
    forward = Net()
    step = copy.deepcopy(forward)
    optimizer = FusedAdam(forward, 0.02, gains=forward.gains)
    for i in range(6):
        raw_gradients(forward, i)  # forces in the forward
        optimizer.step()
        optimizer.zero_grad()
    train_fused(step, 6, 0.02, "effective")
    for net in (forward, step):
        ops.force_normalize_(net.weights)
    assert_nets_close(step, forward, 1e-6)


def test_plain_parameters_are_stepped_as_by_adam(backend: str) -> None:
    shapes = [(), (3,), (5000,), (2, 3, 4), (0,)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    fused, adam = FusedAdam(params, 0.1), torch.optim.Adam(others, 0.1, (0.9, 0.99))
    for step in range(4):
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            p.grad = q.grad = None if i == 1 and step < 2 else torch.randn(p.shape)  # joins in later
        fused.step()
        adam.step()
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-6)
    assert [int(fused.state[p]["step"]) for p in params] == [4, 2, 4, 4, 4]


def test_skipped_parameters_are_averaged(backend: str) -> None:
    net = Net()
    before = net.unused.detach().clone()
    _, ema, _ = train_fused(net, 2, 0.1, "raw")
    assert torch.equal(net.unused, before)
    place = next(i for i, p in enumerate(net.parameters()) if p is net.unused)
    torch.testing.assert_close([profile[place] for profile in ema.profiles], [before] * 2)


@pytest.mark.parametrize("gradients", ["raw", "effective"])
def test_values_that_are_not_finite(backend: str, gradients: str) -> None:
    torch.manual_seed(0)
    nets = [Net() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [FusedAdam(net, 0.1, gains=net.gains, gradients=gradients, force_normalize=True) for net in nets]
    for net, bad in zip(nets, (True, False), strict=True):
        generator = torch.Generator().manual_seed(1)
        for p in [*net.weights, net.bias]:
            p.grad = torch.randn(p.shape, generator=generator)
            p.grad.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf]) if bad else 0.0
    for optimizer in optimizers:
        optimizer.step()
    assert_nets_close(nets[0], nets[1], 0)
    counted = {id(p) for p in [*nets[0].weights, nets[0].bias]}
    assert optimizers[0].nonfinite.tolist() == [3 * (id(p) in counted) for p in nets[0].parameters()]
    assert optimizers[1].nonfinite.sum() == 0
    optimizers[0].step()
    assert optimizers[0].nonfinite.max() == 6  # counts on


def test_loss_scale(backend: str) -> None:
    torch.manual_seed(0)
    nets = [Net() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    scale = LossScale(256.0, interval=2)
    scaled, plain = FusedAdam(nets[0], 0.01, loss_scale=scale), FusedAdam(nets[1], 0.01)
    seen = []
    for step in range(6):
        for net, factor in zip(nets, (scale.scale, 1), strict=True):
            raw_gradients(net, step, factor)
        if step == 3:
            nets[0].bias.grad[0], nets[1].bias.grad[0] = math.inf, 0
        for optimizer in (scaled, plain):
            optimizer.step()
            optimizer.zero_grad()
        seen.append(scale.scale.item())
    assert seen == [256, 512, 512, 256, 256, 512]
    assert_nets_close(nets[0], nets[1], 2e-6)
    again = LossScale()
    again.load_state_dict(copy.deepcopy(scale.state_dict()))
    assert (again.scale, again.good_steps) == (512, 0)
    with pytest.raises(ValueError, match="LossScale: initial > 0"):
        LossScale(0)


def test_resuming_is_exact(backend: str) -> None:
    def make(net: Net) -> tuple[FusedAdam, PowerEMA]:
        ema = PowerEMA(net.parameters(), SIGMA_RELS)
        return FusedAdam(net, 0.02, gains=net.gains, ema=ema, force_normalize=True), ema

    torch.manual_seed(0)
    net = Net()
    optimizer, ema = make(net)
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), ema.state_dict()))
        raw_gradients(net, step)
        optimizer.step(one_minus_betas(step))
        optimizer.zero_grad()
    other = Net()
    resumed, other_ema = make(other)
    for target, state in zip((other, resumed, other_ema), saved, strict=True):
        target.load_state_dict(state)
    for step in range(3, 6):
        raw_gradients(other, step)
        resumed.step(one_minus_betas(step))
        resumed.zero_grad()
    assert_nets_close(other, net, 0)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(optimizer.state[p][k], resumed.state[q][k]) for k in optimizer.state[p])
    assert all(
        torch.equal(a, b)
        for x, y in zip(ema.profiles, other_ema.profiles, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("fused", [False, True])
def test_states_are_interchangeable_with_adam(backend: str, fused: bool) -> None:
    torch.manual_seed(0)
    start = Net()

    def train(first: Callable, second: Callable) -> Net:
        net = copy.deepcopy(start)
        optimizer = first(net)
        for step in range(4):
            if step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = second(net)
                optimizer.load_state_dict(state)
            raw_gradients(net, step)
            optimizer.step()
            optimizer.zero_grad()
        return net

    def adam(net: Net) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), 0.02, (0.9, 0.99), fused=fused)

    def ours(net: Net) -> torch.optim.Optimizer:
        return FusedAdam(net, 0.02)

    expected = train(adam, adam)
    for order in ((ours, adam), (adam, ours), (ours, ours)):
        assert_nets_close(train(*order), expected, 2e-6)
    optimizer = torch.optim.Adam(start.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="FusedAdam: the state's amsgrad must be off, got True"):
        ours(start).load_state_dict(optimizer.state_dict())


def test_weights_and_gains_that_do_not_step_together(backend: str) -> None:
    net = Net()
    prepared = {w: torch.zeros_like(w, requires_grad=False) for w in net.weights}
    optimizer = FusedAdam(net, 0.1, gains=net.gains, prepared=prepared)
    optimizer.prepare()
    net.out_gain.grad = torch.tensor(1.0)
    net.linear.weight.grad = torch.randn(700, 5)
    optimizer.step()
    for weight in net.weights[1:]:
        expected = reference.effective_weight(weight.detach(), net.gains[weight].detach())
        torch.testing.assert_close(prepared[weight], expected)


def test_bad_input(backend: str) -> None:
    net = Net()
    first = net.weights[0]
    stranger = nn.Parameter(torch.zeros(()))
    for message, options in {
        "lr, eps >= 0 and betas": {"lr": -1.0},
        "gradients must be 'raw' or 'effective', got 'none'": {"gradients": "none"},
        "gains must map weights of the network": {"gains": {stranger: stranger}},
        "gains must be 0-dim parameters of the network": {"gains": {first: stranger}},
        "gains must map each weight to a gain of its own": {"gains": dict.fromkeys(net.weights, net.out_gain)},
        r"prepared must hold tensors like their weights, got \[3\]": {"prepared": {first: torch.zeros(3)}},
        "ema must average the optimizer's parameters": {"ema": PowerEMA([first])},
    }.items():
        with pytest.raises(ValueError, match=f"FusedAdam: {message}"):
            FusedAdam(net, **{"lr": 0.1, **options})
    optimizer = FusedAdam(net, 0.1, gains=net.gains, gradients="effective", ema=PowerEMA(net.parameters()))
    with pytest.raises(ValueError, match="FusedAdam: one_minus_betas must have 2 entries, got 0"):
        optimizer.step()
    net.out_gain.grad = torch.ones(())
    with pytest.raises(ValueError, match='with "effective" gradients, gains must have none of their own'):
        optimizer.step([0.5, 0.5])
    with pytest.raises(ValueError, match="FusedAdam: all parameters form one group"):
        FusedAdam([{"params": [net.bias]}, {"params": [net.unused]}], 0.1)


def test_leaves_no_graph(backend: str) -> None:
    net = Net()
    train_fused(net, 1, 0.1, "raw")
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())
    out = ops.effective_weight(net.conv.weight)
    net.conv.weight.grad = torch.ones_like(net.conv.weight)
    FusedAdam(net, 0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
