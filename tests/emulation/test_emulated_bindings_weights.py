"""The CUDA half of the torch layer on emulated kernels (the fixture `ops`): passes over lists of weights."""

from types import SimpleNamespace

import emulated
import pytest
import torch
from layouts import EPS, LAYOUT_PAIRS, LAYOUTS, strided, to_channels_last
from torch import Tensor

from edm2ext import reference


def test_ema_update(ops: SimpleNamespace):
    shapes = [(4, 3, 3, 3), (), (5,), (0,)]
    params = [emulated.random_tensor(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]
    params[0] = to_channels_last(params[0])
    emas = [[emulated.random_tensor(*p.shape, dtype=torch.float32, seed=9 + k) for p in params] for k in range(2)]
    expected = [
        [e.lerp(p, w) for e, p in zip(profile, params, strict=True)]
        for profile, w in zip(emas, (0.1, 0.7), strict=True)
    ]
    emas[1][0] = strided(emas[1][0])
    ops.ema_update_([e for profile in emas for e in profile], params, [0.1, 0.7])
    torch.testing.assert_close(emas, expected)


WEIGHTS = [(5, 7), (6, 4, 3, 3), (3, 5, 1, 1), (2, 600), (0, 4)]


def _weights(layout: str, seed: int = 0) -> list[Tensor]:
    sizes = [emulated.random_tensor(*shape, dtype=torch.float32, seed=seed + i) for i, shape in enumerate(WEIGHTS)]
    return [LAYOUTS[layout](w) if w.dim() in (4, 5) or layout != "channels_last" else w for w in sizes]


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUT_PAIRS)
def test_effective_weights(ops: SimpleNamespace, layout: str, grad_layout: str):
    weights, gains = _weights(layout), [torch.tensor(0.3 + i) for i in range(len(WEIGHTS))]
    leaves = [t.detach().double().requires_grad_() for t in (*weights, *gains)]
    expected = reference.effective_weight(leaves[: len(weights)], leaves[len(weights) :])
    grads = [torch.full((1,) * w.dim(), 0.5).expand(w.shape) for w in weights]
    if grad_layout != "expanded":
        grads = _weights(grad_layout, seed=20)
    truths = torch.autograd.grad(expected, leaves, [g.double() for g in grads])
    outs = ops.effective_weights(weights, gains, EPS, torch.float16)
    found = [t for ts in ops.effective_weights_backward(grads, weights, gains, EPS) for t in ts]
    for out, truth in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, truth.detach().half(), rtol=2e-3, atol=1e-5)
    for w, out, grad in zip(weights, outs, found, strict=False):
        assert out.is_contiguous(memory_format=reference.memory_format(w))
        assert grad.is_contiguous(memory_format=reference.memory_format(w))
    for grad, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-5)
    for i, w in enumerate(weights):
        torch.testing.assert_close(ops.effective_weight(w, gains[i], 1.0, EPS, torch.float16), outs[i])
        torch.testing.assert_close(
            ops.effective_weight_backward(grads[i], w, gains[i], 1.0, EPS), (found[i], found[len(weights) + i])
        )
        scaled = ops.effective_weight_backward(grads[i], w, None, 0.7, EPS)
        torch.testing.assert_close(scaled[0], found[i] * (0.7 / gains[i]))
        torch.testing.assert_close(ops.normalize_weight(w, EPS), reference.normalize_weight(w))
        plain = w.detach().requires_grad_()
        (truth,) = torch.autograd.grad(reference.normalize_weight(plain), plain, grads[i])
        torch.testing.assert_close(ops.normalize_weight_backward(grads[i], w, EPS), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("force", [False, True])
def test_prepare_weights(ops: SimpleNamespace, force: bool, out_layout: str, layout: str):
    weights = _weights(layout)
    raw = [w.clone() for w in weights]
    expected_weights = [reference.normalize_weight(w) for w in weights] if force else raw
    gains = [torch.tensor(0.5) if i % 2 else None for i in range(len(weights))]
    expected = [
        reference.effective_weight(w, 1 if g is None else g) for w, g in zip(expected_weights, gains, strict=True)
    ]
    out = [torch.full_like(w, torch.nan) for w in _weights(out_layout)]
    ops.prepare_weights(weights, gains, EPS, force, out)
    torch.testing.assert_close(weights, expected_weights)
    torch.testing.assert_close(out, expected)
    again = [w.clone() for w in raw]
    ops.force_normalize_(again, EPS)
    torch.testing.assert_close(again, [reference.normalize_weight(w) for w in raw])


@pytest.mark.parametrize("effective", [False, True])
def test_adam_step(ops: SimpleNamespace, effective: bool):
    """Against the CPU's native op, which tests/test_optim.py compares with torch.optim.Adam."""
    shapes = [(6, 4, 3, 3), (5, 70), (9,), (), (2, 600)]
    values = [
        [emulated.random_tensor(*shape, dtype=torch.float32, seed=10 * k + i).abs() for i, shape in enumerate(shapes)]
        for k in range(6)
    ]
    values[0][0] = to_channels_last(values[0][0])
    for k in range(2, 6):
        values[k][0] = to_channels_last(values[k][0])
    grads = [*values[1][:3], None if effective else values[1][3], values[1][4]]
    scalars = torch.tensor([0.1, 0.5, 0.2, 0.9], dtype=torch.float64)
    results = []
    for namespace in (ops, torch.ops.edm2):
        params, _, exp_avgs, exp_avg_sqs, *emas = [[t.clone() for t in tensors] for tensors in values]
        prepared = [torch.zeros(6, 4, 3, 3), torch.zeros(5, 70, dtype=torch.bfloat16)]
        counts = torch.zeros(7, dtype=torch.int64)
        namespace.adam_step_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [e for profile in emas for e in profile],
            prepared,
            [0, 1],
            [1, 1, 0, 0, 1],
            [-1, 3, -1, -1, -1],
            [0, 1, 2, 3, 6],
            scalars,
            torch.tensor(2.0),
            counts,
            0.9,
            0.99,
            1e-8,
            EPS,
            effective,
            True,
        )
        results.append([*params, *exp_avgs, *exp_avg_sqs, *emas[0], *emas[1], *prepared, counts])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_errors_of_adam_step(ops: SimpleNamespace):
    p, scalars, counts = torch.ones(2, 3), torch.ones(2, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def call(
        params: list[Tensor],
        grads: list[Tensor | None],
        prepared: list[Tensor] = [],  # noqa: B006 - never changed
        gains: list[int] = [-1],  # noqa: B006
        scalars: Tensor = scalars,
    ) -> None:
        ops.adam_step_(
            params, grads, params, params, [], prepared, [0] * len(prepared), [1] * len(params), gains,
            [0] * len(params), scalars, None, counts, 0.9, 0.99, 1e-8, EPS, False, False,
        )  # fmt: skip

    for message, arguments in {
        "params: expected float32 on a GPU, got Double": ([p.double()], [p.double()]),
        "grads: expected one entry per parameter, 1, got 0": ([p], []),
        "grads: expected shape": ([p], [p[:1]]),
        "params: expected weights of shape": ([p[0]], [p[0]]),
        "params: expected contiguous or channels_last": ([p.t()], [p.t()]),
        "prepared: expected float32, float16 or bfloat16 on a GPU": ([p], [p], [p.double()]),
        "prepared_of: expected the index of a weight": ([p], [None], [p]),
        "gains: expected the indices of parameters": ([p], [p], [], [5]),
        "scalars: expected 2 elements of Double, got 3": ([p], [p], [], [-1], torch.ones(3, dtype=torch.float64)),
    }.items():
        with pytest.raises(RuntimeError, match=f"adam_step_: {message}"):
            call(*arguments)
