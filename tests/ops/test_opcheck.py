"""torch.library.opcheck on every native op: schema, fake, autograd registration and AOT dispatch."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import edm2ext.ops  # noqa: F401 - registers the fakes

Make = Callable[..., Tensor]
PHILOX = torch.tensor([5, 6])
BOX, TAPS = [0.5, 0.5], [0.125, 0.375, 0.375, 0.125]


def channels_last(x: Tensor) -> Tensor:
    return x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)


def expanded(x: Tensor) -> Tensor:
    """The same shape with strides of 0, as `sum().backward()` hands it over."""
    return torch.randn([1] * x.dim(), dtype=x.dtype).expand(x.shape)


def arguments(name: str, r: Make) -> list[tuple]:
    """Sample arguments for an op, its tensors made by r(*shape)."""
    x, c, w, gain = r(2, 6, 4, 5), r(2, 6), r(5, 3, 3, 3), r()
    y = channels_last(x)
    lists = [w, r(4, 7)], [gain, r()]
    return {
        "pixel_norm": [(x, 1e-4), (y, 1e-4), (c, 1e-4)],
        "pixel_norm_backward": [(r(2, 6, 4, 5), x, 1e-4), (expanded(x), y, 1e-4)],
        "pixel_norm_silu": [(x, 1e-4), (y, 1e-4)],
        "pixel_norm_silu_backward": [(r(2, 6, 4, 5), expanded(x), y, 1e-4)],
        "mp_silu": [(x,), (y,), (x.detach().permute(2, 0, 3, 1),), (r(2, 3, 2, 3, 2),)],
        "mp_silu_backward": [(expanded(x), x), (r(2, 6, 4, 5), y)],
        "mp_silu_modulated": [(x, c), (y, c)],
        "mp_silu_modulated_backward": [(expanded(x), x, c), (r(2, 6, 4, 5), y, c)],
        "mp_silu_modulated_dropout": [(x, c, PHILOX, 3, 9000), (y, c, PHILOX, 0, 60000)],
        "mp_silu_modulated_dropout_backward": [
            (expanded(x), x, c, PHILOX, 3, 9000),
            (r(2, 6, 4, 5), y, c, PHILOX, 0, 60000),
        ],
        "mp_sum": [(x, r(2, 6, 4, 5), 0.3, math.inf), (y, r(2, 6, 4, 5), 0.3, 0.5)],
        "mp_sum_clipped": [(x, r(2, 6, 4, 5), 0.3, 0.5), (y, r(2, 6, 4, 5), 0.3, 1.0), (r(3, 7), r(3, 7), 0.3, 0.5)],
        "mp_sum_backward": [
            (expanded(x), x, torch.arange(30, dtype=torch.uint8), 0.3, False),
            (y, None, torch.arange(30, dtype=torch.uint8), 0.3, True),
            (x, y, None, 0.5, True),
            (r(2, 6, 1, 1), None, None, 0.5, True),
        ],
        "mp_cat": [(x, r(2, 3, 4, 5), 0.3), (y, channels_last(r(2, 3, 4, 5)), 0.5)],
        "mp_cat_backward": [(x, 2, 0.3), (y, 2, 0.5), (expanded(x), 1, 0.5)],
        "mp_cat_silu": [(x, r(2, 3, 4, 5), 0.3), (y, channels_last(r(2, 3, 4, 5)), 0.5)],
        "mp_cat_silu_backward": [(expanded(x), r(2, 6, 4, 5), x, 2, 0.3), (x, y, y, 2, 0.5)],
        "mp_fourier": [(r(4), r(9), r(9))],
        "mp_fourier_backward": [(r(4, 9), r(4), r(9), r(9)), (expanded(r(4, 9)), r(4), r(9), r(9))],
        "precondition_input": [
            (x.detach(), torch.rand(2), 0.5, torch.bfloat16, True),
            (y.detach(), torch.rand(1), 0.4, torch.float32, False),
        ],
        "precondition_output": [
            (x.detach(), y, torch.rand(2), 0.5),
            (y.detach(), x.detach().bfloat16(), torch.rand(1), 0.4),
        ],
        "precondition_output_backward": [
            (expanded(x), torch.rand(2), 0.5, torch.float32, True),
            (y.detach(), torch.rand(1), 0.4, torch.bfloat16, False),
        ],
        "denoising_loss": [
            (x.detach(), y.detach(), r(2, 6, 4, 5).detach(), torch.rand(2), torch.rand(2), 0.5, 0.1),
            (y.detach().bfloat16(), x.detach(), expanded(x), torch.rand(2), torch.rand(2), 0.4, 1.0),
        ],
        "sampler_step": [
            (x.detach(), y.detach(), None, 1.0, None, *torch.rand(2), None, 0.0),
            (y.detach(), *[expanded(x)] * 2, 2.0, x.detach(), *torch.rand(2), x.detach(), 1.5),
        ],
        "sampler_step_input": [
            (x.detach(), y.detach(), None, 1.0, None, *torch.rand(2), None, 0.0, 0.0, 0.5, torch.bfloat16, True),
            (
                *[y.detach(), *[expanded(x)] * 2, 2.0, x.detach(), *torch.rand(2), x.detach(), 1.5],
                *[0.1, 0.4, torch.float32, False],
            ),
        ],
        "resample_down": [(x, BOX), (y, TAPS)],
        "resample_down_backward": [(r(2, 6, 2, 2), BOX, 4, 5), (channels_last(r(2, 6, 2, 3)), TAPS, 4, 6)],
        "resample_down_pixel_norm": [(x, 1e-4), (y, 1e-4)],
        "resample_down_pixel_norm_backward": [
            (expanded(r(2, 6, 2, 2)), r(2, 6, 2, 2), r(2, 6, 2, 2), r(2, 2, 2).detach(), 1e-4, 5, 4),
            (r(2, 6, 2, 3), r(2, 6, 2, 3), channels_last(r(2, 6, 2, 3)), r(2, 2, 3).detach(), 1e-4, 4, 6),
        ],
        "resample_up": [(x, BOX), (y, TAPS)],
        "resample_up_backward": [(r(2, 6, 4, 2), BOX), (channels_last(r(2, 6, 4, 2)), TAPS)],
        "normalize_weight": [(w, 1e-4), (channels_last(w), 1e-4)],
        "normalize_weight_backward": [(expanded(w), w, 1e-4), (w, channels_last(w), 1e-4)],
        "effective_weight": [
            (w, gain, 1.0, 1e-4, torch.float32),
            (channels_last(w), None, 0.7, 1e-4, torch.bfloat16),
        ],
        "effective_weight_backward": [(expanded(w), w, gain, 1.0, 1e-4), (w, channels_last(w), None, 0.7, 1e-4)],
        "effective_weights": [(*lists, 1e-4, torch.float32)],
        "effective_weights_backward": [([expanded(x) for x in lists[0]], *lists, 1e-4)],
        "force_normalize_": [([w.detach(), channels_last(r(4, 3, 2, 2)).detach()], 1e-4)],
        "prepare_weights": [
            (
                [t.detach() for t in lists[0]],
                [gain.detach(), None],
                1e-4,
                True,
                [torch.empty(5, 3, 3, 3), r(4, 7).detach()],
            ),
            ([w], [None], 1e-4, False, [channels_last(w).detach().bfloat16()]),
        ],
        "qkv_norm": [(x, 2, 1e-4), (y, 1, 1e-4)],
        "qkv_norm_backward": [
            (*[r(2, 2, 20, 1) for _ in range(3)], x, 2, 1e-4),
            (*[expanded(r(2, 1, 20, 2))] * 3, y, 1, 1e-4),
        ],
        "conv_weight_grad": [
            (r(2, 3, 4, 5), r(2, 8, 4, 5), 3),
            (expanded(r(2, 3, 4, 5)), channels_last(r(2, 8, 4, 5)), 1),
            (r(3, 3, 4, 5).detach().bfloat16(), r(3, 8, 4, 5).detach().bfloat16(), 3),
        ],
        "ema_update_": [([r(3).detach(), r(2, 4).detach()] * 2, [r(3), r(2, 4)], [0.1, 0.5])],
        "accumulate_snapshots_": [
            (r(3, 5).detach(), [r(5), r(5)], torch.randn(2, 3, dtype=torch.float64), compensated)
            for compensated in (False, True)
        ],
        "sum_snapshots_": [
            (torch.empty(3, 5, dtype=dtype), [r(5), r(5)], torch.randn(2, 3, dtype=torch.float64), compensated)
            for compensated, dtype in ((False, torch.float16), (True, torch.float32))
        ],
        "adam_step_": [
            (
                *[[r(3, 4).detach(), r().detach()] for _ in range(1)],
                [r(3, 4).detach(), None],
                *[[torch.rand(3, 4), torch.rand(())] for _ in range(2)],
                [torch.rand(3, 4), torch.rand(())],
                [torch.rand(3, 4).bfloat16()],
                *[[0], [1, 0], [1, -1], [0, 1]],
                *[torch.rand(3, dtype=torch.float64), torch.ones(()), torch.zeros(2, dtype=torch.int64)],
                *[0.9, 0.99, 1e-8, 1e-4, True, True],
            )
        ],
    }[name]


# Those without a CPU kernel, the convolutions, are checked under emulation (test_emulated_bindings_conv.py).
NAMES = sorted(
    name.removeprefix("edm2::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("edm2::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
)


def test_the_library_has_ops() -> None:
    assert len(NAMES) == 46


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, requires_grad: bool) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=requires_grad)

    for args in arguments(name, random):
        torch.library.opcheck(getattr(torch.ops.edm2, name).default, args)
