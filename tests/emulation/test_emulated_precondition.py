"""Preconditioning: the CUDA kernels under emulation against the reference in float64."""

from functools import partial

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

SIGMA_DATA = 0.4
# Samples of whole packs, samples that are none, several blocks, single elements.
SHAPES = [(2, 4, 16), (3, 3, 35), (2, 5, 7), (1, 7, 640), (2, 1, 8), (1, 1, 1), (2, 31, 8)]
LAYOUTS = {"nchw": False, "nhwc": True}


def sigmas(count: int) -> Tensor:
    return torch.linspace(-2, 3, count).exp()


def image(flat: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    return emulated.from_memory(flat, shape, channels_last)


def scale(
    library: Library,
    x: Tensor,
    sigma: Tensor,
    dtype: torch.dtype,
    layouts: tuple[bool, bool],
    as_input: bool,
    offsets: tuple[int, int] = (0, 0),
) -> list[Tensor]:
    """c_in * x and ones, or c_out * x, for x [N, C, P]."""
    n, c, p = x.shape
    source = Guarded(emulated.to_memory(x, layouts[0]), torch.float32, offsets[0])
    out = Guarded(n * (c + as_input) * p, dtype, offsets[1])
    tensors = source.tensor, sigma, out.tensor
    library.call("precondition_scale", *tensors, *x.shape, *layouts, as_input, sigma.numel() > 1, SIGMA_DATA, dtype)
    out.check_margins()
    return [image(out.tensor, (n, c + as_input, p), layouts[1])]


def output(
    library: Library, x: Tensor, f: Tensor, sigma: Tensor, layouts: tuple[bool, bool], offsets: tuple[int, int] = (0, 0)
) -> list[Tensor]:
    """D for x and F [N, C, P]."""
    source = Guarded(emulated.to_memory(x, layouts[0]), torch.float32, offsets[0])
    raw = Guarded(emulated.to_memory(f, layouts[1]), f.dtype, offsets[1])
    out = Guarded(x.numel(), torch.float32, offsets[0])
    tensors = source.tensor, raw.tensor, sigma, out.tensor
    library.call("precondition_output", *tensors, *x.shape, *layouts, sigma.numel() > 1, SIGMA_DATA, f.dtype)
    out.check_margins()
    return [image(out.tensor, tuple(x.shape), layouts[0])]


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("precondition")


@pytest.mark.parametrize("to_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input(library: Library, shape: tuple[int, ...], dtype: torch.dtype, layout: str, to_layout: str):
    layouts = LAYOUTS[layout], LAYOUTS[to_layout]
    x = emulated.random_tensor(*shape, dtype=torch.float32)
    for sigma in (sigmas(1), sigmas(shape[0])):
        plain = reference.precondition_input(x[..., None], sigma, SIGMA_DATA, dtype)[..., 0]
        exact = reference.precondition_input(x[..., None].double(), sigma.double(), SIGMA_DATA)[..., 0]
        for offsets in ((0, 0), (1, 0), (0, 1)):
            run = partial(scale, library, x, sigma, dtype, layouts, True, offsets)
            (out,) = emulated.under_all_schedules(library, run)
            emulated.assert_as_accurate(out, plain, exact, f"{shape} {dtype} {layouts} {offsets}")
            assert torch.equal(out[:, -1], torch.ones_like(out[:, -1]))


@pytest.mark.parametrize("f_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_its_backward(
    library: Library, shape: tuple[int, ...], dtype: torch.dtype, layout: str, f_layout: str
):
    layouts = LAYOUTS[layout], LAYOUTS[f_layout]
    x, grad = (emulated.random_tensor(*shape, dtype=torch.float32, seed=i) for i in range(2))
    f = emulated.random_tensor(*shape, dtype=dtype, seed=2)
    for sigma in (sigmas(1), sigmas(shape[0])):
        plain, exact = (_plain(*(t.to(convert) for t in (x,)), t, sigma, grad) for convert, t in _types(f))
        for offsets in ((0, 0), (1, 0), (0, 1)):
            (out,) = emulated.under_all_schedules(library, partial(output, library, x, f, sigma, layouts, offsets))
            emulated.assert_as_accurate(out, plain[0], exact[0], f"D, {shape} {dtype} {layouts} {offsets}")
            run = partial(scale, library, grad, sigma, dtype, layouts, False, offsets)
            (grad_f,) = emulated.under_all_schedules(library, run)
            emulated.assert_as_accurate(grad_f, plain[1], exact[1], f"grad, {shape} {dtype} {layouts} {offsets}")


def _types(f: Tensor) -> list[tuple[torch.dtype, Tensor]]:
    return [(torch.float32, f), (torch.float64, f.double())]


def _plain(x: Tensor, f: Tensor, sigma: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    f = f[..., None].detach().requires_grad_()
    out = reference.precondition_output(x[..., None], f, sigma.to(x), SIGMA_DATA)
    (grad_f,) = torch.autograd.grad(out, f, grad[..., None].to(out))
    return out.detach()[..., 0], grad_f[..., 0]


def test_more_elements_than_threads(library: Library):
    """Every thread takes several units."""
    x, sigma = emulated.random_tensor(2, 3, 2801, dtype=torch.float32), sigmas(2)
    run = partial(scale, library, x, sigma, torch.float16, (False, True), True)
    (out,) = emulated.under_all_schedules(library, run)
    expected = reference.precondition_input(x[..., None], sigma, SIGMA_DATA, torch.float16)[..., 0]
    torch.testing.assert_close(out, expected)
    (out,) = emulated.under_all_schedules(library, partial(output, library, x, x, sigma, (False, True)))
    torch.testing.assert_close(
        out, reference.precondition_output(x[..., None], x[..., None], sigma, SIGMA_DATA)[..., 0]
    )


def test_empty(library: Library):
    before = library.launches()
    for shape in ((0, 3, 4), (2, 3, 0)):
        x = torch.empty(shape)
        scale(library, x, sigmas(1), torch.float16, (False, True), True)
        output(library, x, x.half(), sigmas(1), (False, True))
    assert library.launches() == before
