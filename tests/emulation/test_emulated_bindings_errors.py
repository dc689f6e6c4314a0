"""The CUDA half of the torch layer on emulated kernels (the fixture `ops`): what it refuses, and how it says so."""

from types import SimpleNamespace

import pytest
import torch
from layouts import EPS


def test_double_is_refused(ops: SimpleNamespace):
    x = torch.ones(2, 3, 4, dtype=torch.float64)
    message = "expected float32, float16 or bfloat16 on a GPU, got Double"
    for call in (
        lambda: ops.pixel_norm(x, EPS),
        lambda: ops.pixel_norm_silu_backward(x, x, x, EPS),
        lambda: ops.mp_silu(x),
        lambda: ops.mp_silu_backward(x, x),
        lambda: ops.mp_silu_modulated(x, x[..., 0]),
        lambda: ops.mp_silu_modulated_backward(x, x, x[..., 0]),
        lambda: ops.resample_up(x[None], [1.0, 1.0]),
        lambda: ops.qkv_norm(x, 1, EPS),
        lambda: ops.resample_down_pixel_norm(x[None], EPS),
        lambda: ops.mp_sum(x, x, 0.5, 1.0),
        lambda: ops.mp_sum_clipped(x, x, 0.5, 1.0),
        lambda: ops.mp_sum_backward(x, None, None, 0.5, False),
        lambda: ops.mp_cat(x, x, 0.5),
        lambda: ops.mp_cat_silu_backward(x, x, x, 1, 0.5),
        lambda: ops.mp_cat_silu_only(x, x, 0.5),
        lambda: ops.mp_cat_silu_only_backward(x, x, x, x, 0.5),
        lambda: ops.mp_fourier(x[0, 0], x[0, 0], x[0, 0]),
        lambda: ops.mp_fourier_backward(x[0, :, :3], x[0, :, 0], x[0, :, 0], x[0, :, 0]),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    w = torch.ones(2, 3)
    for call in (
        lambda: ops.normalize_weight(x, EPS),
        lambda: ops.normalize_weight_backward(x, x, EPS),
        lambda: ops.effective_weight(w, None, 1.0, EPS, torch.float64),
        lambda: ops.effective_weight_backward(w.double(), w, None, 1.0, EPS),
        lambda: ops.prepare_weights([w], [None], EPS, False, [w.double()]),
        lambda: ops.force_normalize_([x], EPS),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(RuntimeError, match="ema_update_: params: expected float32 on a GPU, got Double"):
        ops.ema_update_([x], [x], [0.5])
    with pytest.raises(RuntimeError, match="inputs: expected float16, bfloat16 or float32, got Double"):
        ops.accumulate_snapshots_(torch.zeros(1, 2, 3, 4), [x], x[0, :1, :1], False)


def test_errors_name_op_and_argument(ops: SimpleNamespace):
    x, c = torch.ones(2, 3, 4), torch.ones(2, 3)
    for message, call in {
        r"pixel_norm: x: expected shape \[batch, channels, ...\], got \[4\]": lambda: ops.pixel_norm(x[0, 0], EPS),
        r"mp_silu_modulated: c: expected shape \[2, 3\], got \[3, 2\]": lambda: ops.mp_silu_modulated(x, c.t()),
        "mp_silu_modulated: c: expected dtype Float, got Half": lambda: ops.mp_silu_modulated(x, c.half()),
        r"mp_silu_modulated_dropout: philox: expected int64 of shape \[2\], got Float of shape \[2, 3\]": lambda: (
            ops.mp_silu_modulated_dropout(x, c, c, 0, 9)
        ),
        "mp_silu_modulated_dropout: threshold: expected 0 to 65535, got 65536": lambda: ops.mp_silu_modulated_dropout(
            x, c, torch.arange(2), 0, 65536
        ),
        "mp_silu_modulated_dropout: subsequence: expected 0 to 65535, got -1": lambda: ops.mp_silu_modulated_dropout(
            x, c, torch.arange(2), -1, 9
        ),
        "mp_silu_backward: grad: expected shape": lambda: ops.mp_silu_backward(x[:1], x),
        "pixel_norm_silu_backward: grad_silu: expected dtype": lambda: ops.pixel_norm_silu_backward(
            x, x.half(), x, EPS
        ),
        "precondition_input: x: expected dtype Float, got Half": lambda: ops.precondition_input(
            x[None].half(), c[0], 0.5, torch.float16, True
        ),
        r"precondition_input: sigma: expected 1 or 1 elements, got shape \[3\]": lambda: ops.precondition_input(
            x[None], c[0], 0.5, torch.float16, True
        ),
        r"precondition_output: f: expected shape \[1, 2, 3, 4\], got \[2, 3, 4\]": lambda: ops.precondition_output(
            x[None], x, c[0, :1], 0.5
        ),
        "precondition_output: x: expected float32, float16 or bfloat16 on a GPU, got Double": (
            lambda: ops.precondition_output(x[None].double(), x[None].double(), c[0, :1].double(), 0.5)
        ),
        r"denoising_loss: u: expected shape \[1\], got \[1, 1\]": lambda: ops.denoising_loss(
            *[x[None]] * 3, c[0, :1], c[:1, :1], 0.5, 1.0
        ),
        "denoising_loss: y: expected dtype Float, got Half": lambda: ops.denoising_loss(
            x[None], x[None], x[None].half(), c[0, :1], c[0, :1], 0.5, 1.0
        ),
        r"sampler_step: t_hat: expected one number, got shape \[2\]": lambda: ops.sampler_step(
            x[None], x[None], None, 1.0, None, c[:, 0], c[0, 0], None, 0.0
        ),
        "sampler_step_input: start: expected shape": lambda: ops.sampler_step_input(
            x[None], x[None], None, 1.0, x, c[0, 0], c[0, 0], None, 0.0, 0.0, 0.5, torch.float16, True
        ),
        "resample_up: filter: expected at most 128 taps on a GPU, got 130": lambda: ops.resample_up(
            x[None], [1.0] * 130
        ),
        "resample_down: x: expected height and width of at least 2": lambda: ops.resample_down(x[None, :, :1], [1, 1]),
        "resample_down_pixel_norm_backward: y: expected the result for height 9 and width 9": (
            lambda: ops.resample_down_pixel_norm_backward(x[None], x[None], x[None], x, EPS, 9, 9)
        ),
        r"resample_down_pixel_norm_backward: rms: expected shape \[1, 3, 4\] and dtype Float, got \[2, 3, 4\]": (
            lambda: ops.resample_down_pixel_norm_backward(x[None], x[None], x[None], x, EPS, 6, 8)
        ),
        "qkv_norm: qkv: expected a multiple of 3 . heads = 6 channels, got 3": lambda: ops.qkv_norm(x, 2, EPS),
        r"qkv_norm_backward: grad_k: expected shape \[2, 1, 4, 1\]": lambda: ops.qkv_norm_backward(
            x[:, :1, :, None], x, x, x, 1, EPS
        ),
        "ema_update_: emas: expected profiles . parameters = 2": lambda: ops.ema_update_([x], [x], [0.5, 0.1]),
        r"normalize_weight: w: expected shape \[out, in, ...\], got \[4\]": lambda: ops.normalize_weight(x[0, 0], EPS),
        "effective_weight: gain: expected a float32 tensor without dimensions": lambda: ops.effective_weight(
            c, c, 1.0, EPS, torch.float32
        ),
        "effective_weights: gains: expected as many": lambda: ops.effective_weights([c], [], EPS, torch.float32),
        "effective_weight_backward: grad: expected shape": lambda: ops.effective_weight_backward(x, c, None, 1.0, EPS),
        "force_normalize_: weights: expected tensors of one dtype": lambda: ops.force_normalize_([c, c.half()], EPS),
        "prepare_weights: out: expected shape": lambda: ops.prepare_weights([c], [None], EPS, True, [c.t()]),
        "prepare_weights: out: expected a contiguous": lambda: ops.prepare_weights(
            [c], [None], EPS, True, [torch.ones(3, 2).t()]
        ),
        "ema_update_: emas: expected shape": lambda: ops.ema_update_([c], [x], [0.5]),
        "mp_sum: b: expected dtype Float, got Half": lambda: ops.mp_sum(x, x.half(), 0.5, 1.0),
        "mp_sum: clip: expected at least 0, got -1": lambda: ops.mp_sum(x, x, 0.5, -1.0),
        "mp_sum_backward: more_grad: expected shape": lambda: ops.mp_sum_backward(x, x[:1], None, 0.5, False),
        r"mp_sum_backward: mask: expected 3 bytes, got Byte of shape \[4\]": lambda: ops.mp_sum_backward(
            x, None, torch.zeros(4, dtype=torch.uint8), 0.5, False
        ),
        r"mp_sum_backward: grad: expected 4 or 5 dimensions for channels_last, got shape \[2, 3, 4\]": (
            lambda: ops.mp_sum_backward(x, None, None, 0.5, True)
        ),
        "mp_cat: b: expected the shape of a but for dimension 1": lambda: ops.mp_cat(x, x[:1], 0.5),
        "mp_cat_backward: channels_a: expected 1 to 2, got 3": lambda: ops.mp_cat_backward(x, 3, 0.5),
        "mp_cat_silu_backward: grad_silu: expected dtype": lambda: ops.mp_cat_silu_backward(x, x.half(), x, 1, 0.5),
        "mp_cat_silu_only: b: expected the shape of a but for dimension 1": lambda: ops.mp_cat_silu_only(x, x[:1], 0.5),
        "mp_cat_silu_only_backward: a, b: expected shapes": lambda: ops.mp_cat_silu_only_backward(
            x, x, x[0, 0], x, 0.5
        ),
        "mp_cat_silu_only_backward: b: expected 3 channels and otherwise": lambda: ops.mp_cat_silu_only_backward(
            x, x, x, x[:1], 0.5
        ),
        r"mp_cat_silu_only_backward: grad: expected 6 channels .* \[2, 3, 4\], got \[2, 3, 4\]": (
            lambda: ops.mp_cat_silu_only_backward(x, x, x, x, 0.5)
        ),
        "mp_cat_silu_only_backward: grad_silu: expected dtype Float, got Half": (
            lambda: ops.mp_cat_silu_only_backward(x.tile(1, 2, 1), x.tile(1, 2, 1).half(), x, x, 0.5)
        ),
        r"mp_fourier: x: expected one dimension, got shape \[2, 3\]": lambda: ops.mp_fourier(c, c[0], c[0]),
        r"mp_fourier_backward: grad: expected shape \[2, 3\]": lambda: ops.mp_fourier_backward(
            c.t(), c[:, 0], c[0], c[0]
        ),
        r"accumulate_snapshots_: coefs: expected float64 of shape \[1, 2\]": lambda: ops.accumulate_snapshots_(
            c, [c[0]], c.double(), False
        ),
        r"accumulate_snapshots_: inputs: expected shape \[3\]": lambda: ops.accumulate_snapshots_(
            c, [c[0, :2]], c[:1, :2].double(), False
        ),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
