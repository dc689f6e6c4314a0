"""torch.compile(fullgraph=True) of the whole network, and of somebody's model that uses our layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from edm2ext import ops
from edm2ext.nn import MPConv, MPFourier, MPLinear
from python_train.network import Precond

# Dynamo itself instantiates autograd.Function when it traces one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network() -> Precond:
    torch.manual_seed(0)
    options = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 0, "attn_resolutions": [4]}
    net = Precond(8, 1, 3, use_fp16=False, channels_per_head=8, dropout=0.1, **options)
    for name, param in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(param, 0.5)
    return net


class Users(torch.nn.Module):
    """A residual block with its own conditioning, as in the README."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0, self.conv1 = MPConv(channels, channels, 3), MPConv(channels, channels, 3)
        self.fourier, self.linear = MPFourier(channels), MPLinear(channels, channels)
        self.gain = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, x_silu = ops.pixel_norm(x, silu=True)
        c = self.linear(self.fourier(t), gain=self.gain) + 1
        y = self.conv1(self.conv0(x_silu, then=ops.ModulatedSiLU(c)))
        return ops.mp_sum(x, y, t=0.3, clip=256.0)


def outcome(module: torch.nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Result, gradients, and the weights, which a training forward normalises."""
    torch.manual_seed(1)
    y = call(*inputs)
    found = [y.detach()]
    if torch.is_grad_enabled():
        y.square().mean().backward()
        found += [param.grad for param in module.parameters() if param.grad is not None]
    return [*found, *(param.detach().clone() for param in module.parameters())]


def assert_compiles(
    make: Callable[[], torch.nn.Module], backend: str, *inputs: Tensor, tolerance: float = 1e-5
) -> None:
    plain, module = make(), make()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    expected = outcome(plain, plain, *inputs)
    got = outcome(module, compiled, *inputs)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


INPUTS = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), torch.tensor([0.3, 2.0]), torch.eye(3)[:2]


def test_the_network_in_training() -> None:
    assert_compiles(lambda: network().train(), "aot_eager", *INPUTS)


@torch.no_grad()
def test_the_network_for_sampling() -> None:
    assert_compiles(lambda: network().eval(), "aot_eager", *INPUTS)


def test_a_users_model() -> None:
    def make() -> Users:
        torch.manual_seed(0)
        return Users(8).train()

    assert_compiles(make, "aot_eager", torch.linspace(-1, 1, 512).reshape(1, 8, 8, 8), torch.tensor([0.3]))


@pytest.mark.slow
def test_inductor() -> None:
    with torch._inductor.config.patch(fallback_random=True):  # dropout's seed is drawn as in eager mode
        assert_compiles(lambda: network().train(), "inductor", *INPUTS, tolerance=1e-4)
