"""Outputs and gradients keep the memory format of the input, with both backends."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edm2ext import ops

KEEPING: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = {
    "pixel_norm": ops.pixel_norm,
    "pixel_norm_silu": lambda x: ops.pixel_norm(x, silu=True),
    "mp_silu": ops.mp_silu,
    "mp_silu_modulated": lambda x: ops.mp_silu_modulated(x, x[..., 0, 0].detach()),
    "mp_silu_modulated_dropout": lambda x: ops.mp_silu_modulated(x, x[..., 0, 0].detach(), 0.5, torch.arange(2)),
    "mp_sum": lambda x: ops.mp_sum(x, x.detach(), clip=2.0),
    "mp_cat": lambda x: ops.mp_cat(x, x.detach()),
    "mp_cat_silu": lambda x: ops.mp_cat(x, x.detach(), silu=True),
    "resample_down": ops.resample_down,
    "resample_down_pixel_norm": ops.resample_down_pixel_norm,
    "resample_up": ops.resample_up,
    "normalize_weight": ops.normalize_weight,
    "effective_weight": ops.effective_weight,
    "mp_conv2d": lambda x: ops.mp_conv2d(x, torch.ones(5, 6, 3, 3)),
    "cosine_attention_one_head": lambda x: ops.cosine_attention(x, 1),
    "cosine_attention_two_heads": lambda x: ops.cosine_attention(torch.cat([x, x], dim=1), 2),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", KEEPING)
def test_memory_format(backend: str, name: str, memory_format: torch.memory_format) -> None:
    x = torch.randn(3, 6, 4, 8).contiguous(memory_format=memory_format).requires_grad_()
    outputs = KEEPING[name](x)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    assert all(out.is_contiguous(memory_format=memory_format) for out in outputs)
    (grad,) = torch.autograd.grad(outputs, x, [torch.ones_like(out) for out in outputs])
    if backend == "native":
        assert grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", KEEPING)
def test_inference_mode(backend: str, name: str) -> None:
    with torch.inference_mode():
        x = torch.randn(3, 6, 4, 8)
        outputs, weight = KEEPING[name](x), torch.randn(3, 4)
        ops.force_normalize_(weight)
        ops.ema_update_([[weight]], [torch.zeros(3, 4)], [0.5])
        ops.accumulate_snapshots([weight], [[1.0]], torch.zeros(1, 3, 4))
    assert all(out.is_inference() for out in ((outputs,) if isinstance(outputs, Tensor) else outputs))
