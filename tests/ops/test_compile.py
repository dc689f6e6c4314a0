"""torch.compile(fullgraph=True) of every public function gives eager's outputs and gradients."""

from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from op_testing import DIFFERENTIABLE
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import edm2ext
from edm2ext import ops
from edm2ext.nn import MPConv, MPFourier, MPLinear, force_normalization

# Dynamo itself instantiates autograd.Function when it traces one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
    ),  # Inductor's imports
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _run(function: Callable[..., object], inputs: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    outputs = function(ops, *inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs)
    return outputs, torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_every_function(backend: str, name: str) -> None:
    function, shapes = DIFFERENTIABLE[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_run(compiled, inputs), _run(function, inputs))


@pytest.mark.parametrize("function", [lambda x: ops.mp_sum(x, x), lambda x: ops.mp_cat(x, x, silu=True)[1]])
def test_one_tensor_twice(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))
    x.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(x).sin().sum(), x) for f in (compiled, function))
    torch.testing.assert_close(got, expected)


def test_native_ops_are_in_both_graphs() -> None:
    graphs = []

    def collect(module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(str(module.code))
        return make_boxed_func(module.forward)

    compiler = aot_autograd(fw_compiler=collect)
    function = torch.compile(lambda x, w: ops.mp_conv2d(ops.mp_silu(x), w), fullgraph=True, backend=compiler)
    function(torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)).sum().backward()
    forward, backward = graphs
    assert "edm2.mp_silu.default" in forward
    assert "edm2.effective_weight.default" in forward
    assert "edm2.mp_silu_backward.default" in backward
    assert "edm2.effective_weight_backward.default" in backward


class Block(torch.nn.Module):
    """Every layer, and a residual branch as in spec 3.2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1 = MPConv(8, 16, 3), MPConv(16, 8, 1)
        self.emb, self.fourier = MPLinear(6, 16), MPFourier(6)
        self.gain = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        x, y = ops.pixel_norm(ops.resample_down(x), silu=True)
        y = ops.mp_silu_modulated(self.conv0(y), self.emb(self.fourier(sigma), self.gain) + 1)
        return ops.resample_up(ops.mp_sum(x, self.conv1(y), 0.3, clip=256))


def _step(block: Callable[..., Tensor], module: Block, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    out = block(x, torch.tensor([0.3, 1.7]))
    out.square().sum().backward()
    return [out, *(p.grad for p in module.parameters()), *(p.detach().clone() for p in module.parameters())]


def test_block_with_forced_normalisation_under_inductor() -> None:
    torch.manual_seed(1)
    eager, module = Block(), Block()
    module.load_state_dict(eager.state_dict())
    x = torch.randn(2, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(_step(compiled, module, x), _step(eager, eager, x), rtol=1e-4, atol=1e-5)


def test_changing_shapes_backend_and_mode() -> None:
    module = Block()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (4, 6, 10):
        x = torch.randn(2, 8, size, size)
        torch.testing.assert_close(_step(compiled, module, x), _step(module, module, x), rtol=1e-4, atol=1e-5)
    with edm2ext.set_backend("reference"), force_normalization("off"), torch.no_grad():
        module.weight_before = module.conv0.weight.mul_(2).clone()
        compiled(x, torch.tensor([0.3, 1.7]))
        assert torch.equal(module.conv0.weight, module.weight_before)


def test_mutating_functions(backend: str) -> None:
    weights, params = [torch.randn(3, 4), torch.randn(2, 5)], [torch.randn(4), torch.randn(2, 3)]
    emas = [[torch.randn(4), torch.randn(2, 3)] for _ in range(2)]
    snapshots = [torch.randn(4).half(), torch.randn(4)]
    coefs = torch.randn(2, 3, dtype=torch.float64)

    def update(weights: list[Tensor], emas: list[list[Tensor]], out: Tensor) -> Tensor:
        ops.force_normalize_(weights)
        ops.ema_update_(emas, params, [0.1, 0.6])
        return ops.accumulate_snapshots(snapshots, coefs, out)

    def copies() -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
        return [w.clone() for w in weights], [[ema.clone() for ema in row] for row in emas], torch.ones(3, 4)

    expected, got = copies(), copies()
    update(*expected)
    torch.compile(update, fullgraph=True, backend="aot_eager")(*got)
    torch.testing.assert_close(got, expected)
