"""MP-Fourier and its backward: the CUDA kernels under emulation against the reference in float64."""

import math
from functools import partial

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

# A warp sums up to 32 channels at once, a block 32 channels in 8 rows of samples; a grid has at most 32 or 64 blocks.
SHAPES = [(1, 1), (3, 5), (7, 32), (8, 33), (33, 192), (2, 2100), (300, 3)]


def forward(library: Library, x: Tensor, freqs: Tensor, phases: Tensor) -> list[Tensor]:
    """mp_fourier of x [N] with freqs and phases [C]."""
    inputs = [Guarded(t, t.dtype, 1) for t in (x, freqs, phases)]
    y = Guarded(len(x) * len(freqs), x.dtype, 1)
    library.call("mp_fourier", *(t.tensor for t in (*inputs, y)), len(x), len(freqs), x.dtype)
    y.check_margins()
    return [y.tensor.reshape(len(x), len(freqs))]


def backward(library: Library, grad: Tensor, x: Tensor, freqs: Tensor, phases: Tensor) -> list[Tensor]:
    """The gradients of x, freqs and phases."""
    inputs = [Guarded(t, t.dtype, 1) for t in (grad, x, freqs, phases)]
    outputs = [Guarded(t.numel(), t.dtype, 1) for t in (x, freqs, phases)]
    tensors = [t.tensor for t in (*inputs, *outputs)]
    library.call("mp_fourier_backward", *tensors, len(x), len(freqs), x.dtype)
    for out in outputs:
        out.check_margins()
    return [out.tensor for out in outputs]


def plain(x: Tensor, freqs: Tensor, phases: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients in plain torch, in the dtypes of x and of the buffers."""
    leaves = [t.detach().requires_grad_() for t in (x, freqs, phases)]
    y = reference.mp_fourier(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check(library: Library, batch: int, channels: int, dtype: torch.dtype, bandwidth: float = 1) -> None:
    """Forward and backward under all schedules."""
    x = emulated.random_tensor(batch, dtype=dtype)
    freqs = emulated.random_tensor(channels, dtype=torch.float32, seed=1, scale=2 * math.pi * bandwidth)
    phases = 2 * math.pi * torch.rand(channels, generator=torch.Generator().manual_seed(2))
    grad = emulated.random_tensor(batch, channels, dtype=dtype, seed=3)
    exact = plain(x.double(), freqs.double(), phases.double(), grad.double())
    rounded = plain(x, freqs, phases, grad)
    inputs = (x, freqs, phases)
    outputs = emulated.under_all_schedules(library, partial(forward, library, *inputs))
    outputs += emulated.under_all_schedules(library, partial(backward, library, grad, *inputs))
    for name, out, low, high in zip(("y", "x", "freqs", "phases"), outputs, rounded, exact, strict=True):
        emulated.assert_as_accurate(out, low, high, f"{name}, {batch} {channels} {dtype} {bandwidth}")


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("mp_fourier")


@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "channels"), SHAPES)
def test_matches_reference(library: Library, batch: int, channels: int, dtype: torch.dtype):
    check(library, batch, channels, dtype)


@pytest.mark.parametrize("bandwidth", [1e-6, 1e2, 1e5])
def test_small_and_large_angles(library: Library, bandwidth: float):
    check(library, 16, 100, torch.float32, bandwidth)


def test_every_quarter_turn(library: Library):
    """Better than plain torch ever is: x = 1, so that angles are those asked for."""
    library.schedule(*emulated.SCHEDULES[0])
    angles = torch.linspace(-40, 40, 2001)
    zeros = torch.zeros_like(angles)
    (y,) = forward(library, torch.ones(1), angles, zeros)
    expected = math.sqrt(2) * angles.double().cos()
    assert (y[0].double() - expected).abs().max() < 2.5e-7
    *_, grad_phases = backward(library, torch.ones(1, len(angles)), torch.ones(1), angles, zeros)
    expected = -math.sqrt(2) * angles.double().sin()
    assert (grad_phases.double() - expected).abs().max() < 2.5e-7


def test_extreme_angles(library: Library):
    x = torch.tensor([0.0, 1e30, torch.inf, torch.nan])
    (y,) = forward(library, x, torch.tensor([1.0, 1e8]), torch.zeros(2))
    assert torch.equal(y[0], torch.full((2,), math.sqrt(2)))
    assert (y[1].abs() <= math.sqrt(2) + 1e-6).all()
    assert y[2:].isnan().all()


def test_nothing_to_sum(library: Library):
    """Without channels the gradient of x is 0, without samples those of the buffers are."""
    library.schedule(*emulated.SCHEDULES[0])
    nothing = torch.empty(0)
    grad_x, *_ = backward(library, torch.empty(3, 0), torch.ones(3), nothing, nothing)
    assert torch.equal(grad_x, torch.zeros(3))
    _, *grads = backward(library, torch.empty(0, 3), nothing, torch.ones(3), torch.ones(3))
    assert all(torch.equal(grad, torch.zeros(3)) for grad in grads)
    assert forward(library, nothing, torch.ones(3), torch.ones(3))[0].shape == (0, 3)


@pytest.mark.parametrize(("batch", "channels"), [(0, 3), (3, 0)])
def test_nothing_to_launch(library: Library, batch: int, channels: int):
    before = library.launches()
    assert forward(library, torch.ones(batch), torch.ones(channels), torch.ones(channels))[0].shape == (batch, channels)
    assert library.launches() == before
