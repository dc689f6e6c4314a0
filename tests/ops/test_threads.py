"""Native results do not depend on the number of threads: work is cut into items, and an item is never shared."""

import pytest
import torch
from op_testing import DIFFERENTIABLE
from torch import Tensor

from edm2ext import ops, set_backend

# large enough for several threads
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "pixel_norm": [(4, 48, 33, 31)],
    "pixel_norm_silu": [(4, 48, 33, 31)],
    "mp_silu": [(4, 48, 33, 31)],
    "mp_silu_modulated": [(4, 130, 33, 31), (4, 130)],
    "mp_sum": [(4, 48, 33, 31)] * 2,
    "mp_sum_clip": [(4, 48, 33, 31)] * 2,
    "mp_cat": [(4, 48, 33, 31), (4, 24, 33, 31)],
    "mp_cat_silu": [(4, 48, 33, 31), (4, 24, 33, 31)],
    "mp_fourier": [(600,), (192,), (192,)],
    "resample_down": [(4, 48, 33, 31)],
    "resample_down_pixel_norm": [(4, 48, 33, 31)],
    "resample_up": [(4, 48, 17, 15)],
    "normalize_weight": [(200, 70, 3, 3)],
    "effective_weight": [(200, 70, 3, 3), ()],
    "effective_weight_list": [(200, 70, 3, 3), (300, 400), ()],
}


def _run(name: str, inputs: list[Tensor], threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    outputs = DIFFERENTIABLE[name][0](ops, *inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    grads = torch.autograd.grad([out.sin().sum() for out in outputs], inputs)
    return [*outputs, *grads]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", SHAPES)
def test_functions(name: str, memory_format: torch.memory_format) -> None:
    inputs = [torch.randn(shape) for shape in SHAPES[name]]
    inputs = [x.contiguous(memory_format=memory_format) if x.dim() == 4 else x for x in inputs]
    for x in inputs:
        x.requires_grad_()
    with set_backend("native"):
        for got, expected in zip(_run(name, inputs, threads=3), _run(name, inputs, threads=1), strict=True):
            assert torch.equal(got, expected)


def _mutated(threads: int, params: list[Tensor]) -> list[Tensor]:
    torch.set_num_threads(threads)
    weights, emas = [p.clone() for p in params], [[torch.ones_like(p) for p in params] for _ in range(2)]
    ops.force_normalize_(weights)
    ops.ema_update_(emas, params, [0.1, 0.7])
    totals = ops.accumulate_snapshots([params[0], params[0].half()], [[0.3, 0.1], [0.7, -2.0]])
    return [*weights, *emas[0], *emas[1], totals]


def test_mutating_functions() -> None:
    params = [torch.randn(200, 70, 3, 3), torch.randn(300, 400), torch.randn(5, 3)]
    with set_backend("native"):
        for got, expected in zip(_mutated(3, params), _mutated(1, params), strict=True):
            assert torch.equal(got, expected)
