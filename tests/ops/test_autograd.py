"""First and second derivatives, forward mode and functorch transforms of every differentiable function."""

from collections.abc import Callable

import pytest
import torch
from op_testing import DIFFERENTIABLE
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from edm2ext import ops, reference


def _case(name: str, requires_grad: bool = True) -> tuple[Callable[..., object], tuple[Tensor, ...]]:
    function, shapes = DIFFERENTIABLE[name]
    inputs = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad) for shape in shapes)
    return lambda *x: _tuple(function(ops, *x)), inputs


def _tuple(outputs: Tensor | tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # in torch's own forward mode
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(backend: str, name: str) -> None:
    function, inputs = _case(name)
    large = sum(x.numel() for x in inputs) > 50
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=large)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=large)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functorch_and_batched_gradients(backend: str, name: str) -> None:
    function, inputs = _case(name)
    weights = [torch.randn_like(out) for out in function(*inputs)]

    def loss(module: object, *x: Tensor) -> Tensor:
        outputs = _tuple(DIFFERENTIABLE[name][0](module, *x))
        return sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))

    places = tuple(range(len(inputs)))
    expected = torch.autograd.grad(loss(reference, *inputs), inputs)
    plain = tuple(x.detach() for x in inputs)
    by_functorch = torch.func.grad(lambda *x: loss(ops, *x), places)(*plain)
    torch.testing.assert_close(by_functorch, expected)
    per_sample = torch.func.vmap(torch.func.grad(lambda *x: loss(ops, *x)), (0, *[None] * (len(plain) - 1)))
    batched = per_sample(torch.stack([plain[0], 2 * plain[0]]), *plain[1:])
    torch.testing.assert_close(batched[0], expected[0])
    if name == "effective_weight_list":
        return  # torch has no batching fallback for ops on lists
    total = loss(ops, *inputs)
    many = torch.autograd.grad(total, inputs, torch.tensor([1.0, 2.0], dtype=torch.float64), is_grads_batched=True)
    torch.testing.assert_close([x[1] for x in many], [2 * x for x in expected])
