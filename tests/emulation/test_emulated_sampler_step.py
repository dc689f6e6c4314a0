"""A step of the sampler: the CUDA kernels under emulation against the reference in float64."""

import itertools
from functools import partial

import emulated
import pytest
import torch
from emulated import Guarded, Library
from torch import Tensor

from edm2ext import reference

SIGMA_DATA, GUIDANCE, CHURN, S_NOISE = 0.4, 2.2, 0.3, 1.003
T_HAT, T_NEXT = torch.tensor([1.7]), torch.tensor([1.1])
SHAPES = [(2, 4, 16), (3, 3, 35), (2, 5, 7), (1, 3, 1400), (1, 1, 1)]
LAYOUTS = {"nchw": False, "nhwc": True}
FORMS = list(itertools.product((False, True), repeat=3))  # with guide, start, noise


def arguments(shape: tuple[int, ...], form: tuple[bool, ...]) -> list["Tensor | None"]:
    """x, denoised, guide, start, noise."""
    names = ["denoised", "guide", "start", "noise", "slope"]
    drawn = {name: emulated.random_tensor(*shape, dtype=torch.float32, seed=i) for i, name in enumerate(names)}
    x = drawn["start"] + (T_NEXT - T_HAT) * drawn["slope"]
    chosen = [drawn[name] if wanted else None for name, wanted in zip(names[1:], form, strict=False)]
    return [x, drawn["denoised"], *chosen]


def step(
    library: Library,
    inputs: list["Tensor | None"],
    layouts: tuple[bool, bool],
    dtype: torch.dtype | None,
    offset: int = 0,
) -> list[Tensor]:
    """The result, and with a dtype the network's input, in the second of the layouts."""
    n, c, p = inputs[0].shape
    given = [None if x is None else Guarded(emulated.to_memory(x, layouts[0]), torch.float32, offset) for x in inputs]
    out = Guarded(n * c * p, torch.float32, offset)
    x_in = None if dtype is None else Guarded(n * (c + 1) * p, dtype)
    tensors = [None if t is None else t.tensor for t in given]
    noise_scale = S_NOISE * ((1 + CHURN) ** 2 - 1) ** 0.5 if inputs[-1] is not None else 0.0
    churn = CHURN if inputs[-1] is not None else 0.0
    library.call(
        "sampler_step",
        *(*tensors, T_HAT, T_NEXT, out.tensor, None if x_in is None else x_in.tensor),
        *(n, c, p, *layouts, GUIDANCE, churn, noise_scale, SIGMA_DATA, dtype or torch.float32),
    )
    out.check_margins()
    found = [emulated.from_memory(out.tensor, (n, c, p), layouts[0])]
    if x_in is None:
        return found
    x_in.check_margins()
    return [*found, emulated.from_memory(x_in.tensor, (n, c + 1, p), layouts[1])]


def plain(inputs: list["Tensor | None"], convert: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, denoised, guide, start, noise = (None if t is None else t.to(convert) for t in inputs)
    churn = 0.0 if noise is None else CHURN
    t_hat, t_next = T_HAT.to(convert), T_NEXT.to(convert)
    options = {"guide": guide, "start": start, "noise": noise}
    out = reference.sampler_step(x, denoised, t_hat, t_next, guidance=GUIDANCE, churn=churn, S_noise=S_NOISE, **options)
    x_in = reference.precondition_input(out[..., None], t_next * (1 + churn), SIGMA_DATA, dtype)
    return out, x_in[..., 0]


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("sampler_step")


@pytest.mark.parametrize("to_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", emulated.DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_matches_reference(library: Library, form: tuple[bool, ...], dtype: torch.dtype, layout: str, to_layout: str):
    layouts = LAYOUTS[layout], LAYOUTS[to_layout]
    for shape in SHAPES:
        inputs = arguments(shape, form)
        rounded, exact = plain(inputs, torch.float32, dtype), plain(inputs, torch.float64, torch.float64)
        for offset in (0, 1):
            outputs = emulated.under_all_schedules(library, partial(step, library, inputs, layouts, dtype, offset))
            for name, out, low, high in zip(("x", "x_in"), outputs, rounded, exact, strict=True):
                emulated.assert_as_accurate(out, low, high, f"{name}, {shape} {form} {dtype} {layouts} {offset}")
            assert torch.equal(outputs[1][:, -1], torch.ones_like(outputs[1][:, -1]))
            (alone,) = step(library, inputs, layouts, None, offset)
            assert torch.equal(alone, outputs[0])


@pytest.mark.parametrize("name", range(6))
def test_one_misaligned_tensor(library: Library, name: int):
    """Packs need all tensors aligned."""
    inputs = arguments((2, 4, 16), (True, True, True))
    expected = step(library, inputs, (False, True), torch.float16)
    original, count = emulated.Guarded, iter(range(100))
    try:
        globals()["Guarded"] = lambda values, dtype, offset=0: original(values, dtype, int(next(count) == name))
        got = step(library, inputs, (False, True), torch.float16)
    finally:
        globals()["Guarded"] = original
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_more_elements_than_threads(library: Library):
    """Every thread takes several units."""
    inputs = arguments((2, 3, 2801), (True, True, True))
    outputs = emulated.under_all_schedules(library, partial(step, library, inputs, (False, True), torch.float16))
    for out, truth in zip(outputs, plain(inputs, torch.float32, torch.float16), strict=True):
        torch.testing.assert_close(out, truth, rtol=2e-3, atol=1e-5)


def test_empty(library: Library):
    before = library.launches()
    for shape in ((0, 3, 4), (2, 3, 0)):
        step(library, arguments(shape, (True, True, True)), (False, True), torch.float16)
    assert library.launches() == before
