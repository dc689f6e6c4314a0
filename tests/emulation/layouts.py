"""What tests of the torch layer share: layouts of inputs and gradients, and the comparison with plain torch."""

from collections.abc import Callable

import emulated
import torch
from torch import Tensor

from edm2ext import reference

EPS = 1e-4


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def to_channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": to_channels_last,
    "strided": strided,
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
}
SHAPES = [(2, 24, 3, 5), (2, 3, 2, 4, 3), (3, 16, 1, 1), (0, 4, 2, 2)]


def check(
    op: Callable[..., object],
    backward: Callable[..., object],
    plain: Callable[..., object],
    inputs: list[Tensor],
    layout: str,
    grad_layout: str,
) -> None:
    """Outputs and gradients of an op against autograd through plain torch in float64."""
    x = LAYOUTS[layout](inputs[0])
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    expected = plain(*leaves)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    outputs = op(x, *inputs[1:])
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    kept = reference.memory_format(x)
    for out, truth in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out.double(), truth.detach(), rtol=1e-4, atol=1e-5)
        assert out.is_contiguous(memory_format=kept)
    if grad_layout == "expanded":
        grads = [torch.full((1,) * x.dim(), 0.5 + i).expand(out.shape) for i, out in enumerate(outputs)]
    else:
        grads = [LAYOUTS[grad_layout](emulated.random_tensor(*out.shape, dtype=x.dtype)) for out in outputs]
    found = backward(*grads, x, *inputs[1:])
    found = [found] if isinstance(found, Tensor) else list(found)
    truths = torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    for grad, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-5)
    assert found[0].is_contiguous(memory_format=kept)


LAYOUT_PAIRS = [(layout, "expanded") for layout in LAYOUTS] + [
    ("channels_last", "contiguous"),
    ("contiguous", "channels_last"),
    ("contiguous", "strided"),
]
