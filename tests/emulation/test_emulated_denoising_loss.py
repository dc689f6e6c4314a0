"""The training loss and its gradients: the CUDA kernels under emulation against the reference in float64."""

from functools import partial

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

SIGMA_DATA, SCALE = 0.4, 0.7
# Samples of whole packs, samples that are none, several chunks (also a last one of few elements), more of them than a
# warp has lanes, single elements.
SHAPES = [(2, 4, 16), (3, 3, 35), (2, 5, 7), (2, 8, 130), (3, 7, 147), (1, 4, 4160), (4, 1, 1)]
LAYOUTS = {"nchw": False, "nhwc": True}


def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """F, x, y [N, C, P], sigma and u [N]."""
    f = emulated.random_tensor(*shape, dtype=dtype)
    x, y = (emulated.random_tensor(*shape, dtype=torch.float32, seed=i) for i in (1, 2))
    u = emulated.random_tensor(shape[0], dtype=torch.float32, seed=3)
    return [f, x, y, torch.linspace(-2, 2, shape[0]).exp(), u]


def run(library: Library, inputs: list[Tensor], layouts: tuple[bool, bool], offset: int = 0) -> list[Tensor]:
    """Loss and gradients; x and y are laid out by the first of the layouts, F by the second."""
    f, x, y, sigma, u = inputs
    raw = Guarded(emulated.to_memory(f, layouts[1]), f.dtype, offset)
    images = [Guarded(emulated.to_memory(image, layouts[0]), torch.float32) for image in (x, y)]
    numbers = [Guarded(values, torch.float32) for values in (sigma, u)]
    loss, grad_u = (Guarded(sigma.numel(), torch.float32) for _ in range(2))
    grad_f = Guarded(f.numel(), f.dtype, offset)
    squares = Guarded(library.int64("denoising_loss_workspace", *f.shape), torch.float32)
    tensors = [t.tensor for t in (raw, *images, *numbers, loss, grad_f, grad_u, squares)]
    library.call("denoising_loss", *tensors, *f.shape, *layouts, SIGMA_DATA, SCALE, f.dtype)
    for out in (loss, grad_f, grad_u, squares):
        out.check_margins()
    return [loss.tensor, emulated.from_memory(grad_f.tensor, tuple(f.shape), layouts[1]), grad_u.tensor]


def plain(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    f, x, y, sigma, u = inputs
    loss, grad_f, grad_u = reference.denoising_loss(
        f[..., None], x[..., None], y[..., None], sigma, u, SIGMA_DATA, SCALE
    )
    return loss, grad_f[..., 0], grad_u


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("denoising_loss")


@pytest.mark.parametrize("f_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(library: Library, shape: tuple[int, ...], dtype: torch.dtype, layout: str, f_layout: str):
    check(library, shape, dtype, (LAYOUTS[layout], LAYOUTS[f_layout]))


def test_more_chunks_and_samples_than_warps(library: Library):
    check(library, (270, 2, 257), torch.float32, (False, True))


def check(library: Library, shape: tuple[int, ...], dtype: torch.dtype, layouts: tuple[bool, bool]) -> None:
    """Loss and gradients under all schedules, aligned and not."""
    inputs = arguments(shape, dtype)
    rounded, exact = plain(inputs), plain([t.double() for t in inputs])
    for offset in (0, 1):
        outputs = emulated.under_all_schedules(library, partial(run, library, inputs, layouts, offset))
        for name, out, low, high in zip(("loss", "grad_f", "grad_u"), outputs, rounded, exact, strict=True):
            emulated.assert_as_accurate(out, low, high, f"{name}, {shape} {dtype} {layouts} {offset}")


def test_does_not_depend_on_the_gpu(library: Library):
    inputs = arguments((3, 7, 1171), torch.float16)
    results = []
    for multiprocessors in (1, 7):
        library.schedule(*emulated.SCHEDULES[0], multiprocessors=multiprocessors)
        results.append(run(library, inputs, (False, True)))
    library.schedule(*emulated.SCHEDULES[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty(library: Library):
    """A sample without elements has no loss; without samples nothing runs."""
    loss, _, grad_u = run(library, arguments((2, 3, 0), torch.float16), (False, True))
    assert loss.tolist() == grad_u.tolist() == [0, 0]
    before = library.launches()
    run(library, arguments((0, 3, 4), torch.float16), (False, True))
    assert library.launches() == before
