"""FusedAdam on a GPU: against the reference, on a stream, in a graph, and without waiting for the device."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import edm2ext
from edm2ext import ops, reference
from edm2ext.nn import MPConv, MPLinear
from edm2ext.optim import FusedAdam, LossScale
from edm2ext.phema import PowerEMA

pytestmark = pytest.mark.gpu
if not (edm2ext.build_info()["cuda"] and torch.cuda.is_available()):
    pytest.skip(f"no GPU to test on: {edm2ext.build_info()['cuda_reason']}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    with edm2ext.set_backend("native"):
        yield


class Net(nn.Module):
    """Rows from 5 to 32,256 elements."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(5, 8, 1), (64, 700, 3), (768, 24, 3), (1536, 12, 3), (3584, 4, 3)]
        self.convs = nn.ModuleList(MPConv(i, o, k) for i, o, k in sizes)
        self.linear = MPLinear(192, 768)
        self.gain = nn.Parameter(torch.tensor(0.3))
        self.bias = nn.Parameter(torch.randn(10001))


def make(gradients: str, layout: torch.memory_format) -> tuple[Net, FusedAdam, list[Tensor]]:
    torch.manual_seed(0)
    net = Net().cuda().to(memory_format=layout)
    layers = [*net.convs, net.linear]
    prepared = {
        layer.weight: torch.empty_like(layer.weight, dtype=torch.bfloat16, requires_grad=False).to(
            memory_format=torch.channels_last if layer.weight.dim() == 4 else torch.contiguous_format
        )
        for layer in layers
    }
    ema = PowerEMA(net.parameters())
    optimizer = FusedAdam(
        net,
        0.01,
        gains={net.linear.weight: net.gain},
        gradients=gradients,
        ema=ema,
        force_normalize=True,
        prepared=prepared,
        loss_scale=LossScale(8.0, device="cuda"),
    )
    optimizer.prepare()
    return net, optimizer, [*prepared.values(), *ema.profiles[0], *ema.profiles[1]]


def set_gradients(net: Net, optimizer: FusedAdam, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        values = torch.randn(p.shape, generator=generator)
        if p.dim() > 0 and step == 1:
            values.view(-1)[:2] = torch.tensor([torch.nan, torch.inf])
        p.grad = values.cuda()
    if optimizer.gradients == "effective":
        net.gain.grad = None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradients", ["raw", "effective"])
def test_matches_reference(gradients: str, layout: torch.memory_format):
    results = []
    for backend in ("native", "reference"):
        with edm2ext.set_backend(backend):
            net, optimizer, others = make(gradients, layout)
            for step in range(4):
                set_gradients(net, optimizer, step)
                optimizer.step([1.0, 0.3] if step == 0 else [0.01, 1e-4])
            results.append([*net.parameters(), *others, optimizer.nonfinite, optimizer.loss_scale.scale])
    for got, expected in zip(*results, strict=True):
        tolerance = 1e-2 if got.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_deterministic():
    runs = []
    for _ in range(2):
        net, optimizer, others = make("effective", torch.channels_last)
        for step in range(3):
            set_gradients(net, optimizer, step)
            optimizer.step([0.1, 0.2])
        runs.append([*net.parameters(), *others])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_does_not_wait_for_the_device():
    net, optimizer, _ = make("effective", torch.channels_last)
    set_gradients(net, optimizer, 0)
    optimizer.step([0.1, 0.2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step([0.1, 0.2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph():
    """A captured step, replayed with new learning rates and averages' weights, is the step itself."""
    plain_net, plain, plain_others = make("effective", torch.channels_last)
    net, optimizer, others = make("effective", torch.channels_last)
    for one, other in ((plain_net, plain), (net, optimizer)):
        set_gradients(one, other, 0)
        other.step([0.5, 0.5])
    graph = torch.cuda.CUDAGraph()
    before = [t.detach().clone() for t in (*net.parameters(), *others)]
    with torch.cuda.graph(graph):
        optimizer.launch()
    assert all(torch.equal(a, b) for a, b in zip(before, (*net.parameters(), *others), strict=True))
    for lr in (0.1, 0.02):
        for other in (plain, optimizer):
            other.param_groups[0]["lr"] = lr
        plain.step([lr, 0.2])
        optimizer.advance([lr, 0.2])
        graph.replay()
    torch.cuda.synchronize()
    pairs = zip((*plain_net.parameters(), *plain_others), (*net.parameters(), *others), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_effective_weights_are_those_of_the_weights():
    net, optimizer, _ = make("effective", torch.contiguous_format)
    set_gradients(net, optimizer, 0)
    optimizer.step([0.1, 0.2])
    for weight, target in optimizer.prepared.items():
        gain = net.gain.detach() if weight is net.linear.weight else 1
        expected = reference.effective_weight(weight.detach(), gain, torch.bfloat16)
        torch.testing.assert_close(target, expected, rtol=1e-2, atol=1e-4)
        normalised = weight.detach().clone()
        ops.force_normalize_(normalised)
        torch.testing.assert_close(weight.detach(), normalised, rtol=1e-6, atol=1e-6)
