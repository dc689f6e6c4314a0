"""Every native op against plain torch on random shapes, dtypes and layouts: thousands of cases, for minutes."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_testing import DTYPES, LAYOUTS, compare
from torch import Tensor

CASES = 600

# Single numbers can cancel to nothing, which leaves an error without a measure: groups have at least four of them.
small = st.integers(1, 9)
channels = st.integers(4, 130)
form = st.fixed_dictionaries(
    {"dtype": st.sampled_from(DTYPES), "layout": st.sampled_from(list(LAYOUTS)), "expanded_grad": st.booleans()}
)
Case = tuple[list[Tensor], dict[str, Any]]


def normal(*shape: int) -> Tensor:
    """Depends on the shape alone: a case that fails is the same when it is tried again."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + 7 * sum(shape))) * 1.5


@st.composite
def image(draw: st.DrawFn) -> Tensor:
    """[N, C, *spatial] with none to three spatial dimensions."""
    spatial = draw(st.lists(small, max_size=3))
    return normal(draw(st.integers(2, 5)), draw(channels), *spatial)


@st.composite
def pair(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    x = draw(image())
    return x, normal(*x.shape).flip(0, 1)


@st.composite
def modulated(draw: st.DrawFn) -> Case:
    x = draw(image())
    return [x, normal(*x.shape[:2])], {}


@st.composite
def summed(draw: st.DrawFn) -> Case:
    # Values near the clip are masked differently in each precision.
    a, b = draw(pair())
    return [a, b], {"t": draw(st.floats(0.05, 0.95)), "clip": draw(st.sampled_from([None, 100.0]))}


@st.composite
def joined(draw: st.DrawFn) -> Case:
    a = draw(image())
    other = normal(a.shape[0], draw(channels), *a.shape[2:])
    return [a, other], {"t": draw(st.floats(0.05, 0.95)), "silu": draw(st.booleans())}


@st.composite
def resampled(draw: st.DrawFn) -> Case:
    half = draw(st.lists(st.floats(0.1, 1), min_size=1, max_size=3))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(2, 12), st.integers(2, 12)))
    return [normal(*shape)], {"filter": (*half, *reversed(half))}


@st.composite
def weight(draw: st.DrawFn) -> Tensor:
    return normal(draw(st.integers(2, 40)), draw(st.integers(4, 300)), *draw(st.sampled_from([(), (1, 1), (3, 3)])))


FUNCTIONS: dict[str, st.SearchStrategy[Case]] = {
    "pixel_norm": st.tuples(image(), st.booleans()).map(lambda c: ([c[0]], {"silu": c[1]})),
    "mp_silu": image().map(lambda x: ([x], {})),
    "mp_silu_modulated": modulated(),
    "mp_sum": summed(),
    "mp_cat": joined(),
    "resample_down": resampled(),
    "resample_up": resampled(),
    "normalize_weight": weight().map(lambda w: ([w], {})),
    "effective_weight": st.tuples(weight(), st.floats(-2, 2)).map(lambda c: ([c[0], torch.tensor(c[1])], {})),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_shape_dtype_and_layout(name: str) -> None:
    @settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=FUNCTIONS[name], form=form)
    def check(case: Case, form: dict[str, Any]) -> None:
        inputs, arguments = case
        if name == "effective_weight":
            form = {**form, "expanded_grad": False}
        compare(name, inputs, **form, units=2, **arguments)

    check()


@st.composite
def attention(draw: st.DrawFn) -> tuple[Tensor, int]:
    heads, depth = draw(st.integers(1, 4)), draw(st.integers(4, 70))
    spatial = draw(st.lists(st.integers(2, 18), min_size=1, max_size=2))
    return normal(draw(st.integers(1, 3)), 3 * heads * depth, *spatial), heads


@pytest.mark.slow
@settings(max_examples=CASES // 2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=attention(), form=form)
def test_any_attention(case: tuple[Tensor, int], form: dict[str, Any]) -> None:
    qkv, heads = case
    compare("cosine_attention", [qkv], num_heads=heads, **form, units=8)


HOSTILE: dict[str, Callable[[Tensor], object]] = {
    "pixel_norm": lambda x: torch.ops.edm2.pixel_norm(x, 1e-4),
    "mp_silu_modulated": lambda x: torch.ops.edm2.mp_silu_modulated(x, x),
    "mp_sum": lambda x: torch.ops.edm2.mp_sum(x, x[..., :1], 0.5, math.inf),
    "mp_cat": lambda x: torch.ops.edm2.mp_cat(x, x.flatten(), 0.5),
    "mp_cat_backward": lambda x: torch.ops.edm2.mp_cat_backward(x, 10**12, 0.5),
    "resample_down": lambda x: torch.ops.edm2.resample_down(x, [1.0, 2.0, 3.0]),
    "resample_up_backward": lambda x: torch.ops.edm2.resample_up_backward(x, []),
    "qkv_norm": lambda x: torch.ops.edm2.qkv_norm(x, 0, 1e-4),
    "force_normalize_": lambda x: torch.ops.edm2.force_normalize_([x, x[..., :1]], 1e-4),
    "ema_update_": lambda x: torch.ops.edm2.ema_update_([x, x], [x[..., :1]], [0.5, 0.5]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 5), max_size=9),
    dtype=st.sampled_from([torch.float32, torch.int64, torch.float16, torch.bool, torch.complex64]),
)
def test_native_ops_survive_nonsense(name: str, shape: list[int], dtype: torch.dtype) -> None:
    """They answer or raise RuntimeError; they never crash."""
    with contextlib.suppress(RuntimeError, NotImplementedError, IndexError):
        HOSTILE[name](torch.ones(shape, dtype=dtype))
