"""The optimizer step over a list of parameters: the CUDA kernels under emulation against the reference in float64."""

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import emulated
import pytest
import torch
from emulated import Guarded, Library
from test_emulated_normalize_weight import pointers
from torch import Tensor

from edm2ext import reference

BETAS, EPS = (0.9, 0.99), 1e-8
F32 = torch.float32


class Case(NamedTuple):
    """A weight [rows, size / inner, inner] or, with 0 rows, a plain parameter of `size` elements; `offset` elements
    past a 16-byte boundary."""

    rows: int
    size: int
    inner: int = 1
    gain: bool = False
    prepared: bool = True
    offset: int = 0


# Weights held in shared memory have up to 12,544 elements with effective gradients, and 25,088 with raw ones.
CASES = [
    Case(5, 1),
    Case(9, 45, 9, gain=True),
    Case(11, 128, prepared=False),
    Case(0, 1),
    Case(3, 72, 9, offset=1),
    Case(3, 24, 4),  # quads in one layout, none in the other
    Case(20, 512, gain=True, prepared=False),
    Case(2, 516),
    Case(0, 4099),
    Case(3, 1152, 9),
    Case(0, 8192),
    Case(0, 9001, offset=3),
    Case(1, 6912, 9, gain=True),
    Case(1, 12600, 9),
    Case(1, 25092, 9),
    Case(1, 32256, gain=True),  # the longest of EDM2-XXL
    Case(40, 1152, 9, gain=True),  # more rows than blocks
]


class State:
    """What a step reads and writes: for each case the parameter, gradient, moments and averages, and the gain's."""

    NAMES = ("param", "grad", "exp_avg", "exp_avg_sq")

    def __init__(self, cases: Sequence[Case], profiles: int, loss_scale: float | None) -> None:
        self.cases = cases
        self.profiles = profiles
        self.loss_scale = None if loss_scale is None else torch.tensor(loss_scale)
        self.tensors: list[dict[str, Tensor]] = []
        self.gains: list[dict[str, Tensor] | None] = []
        for i, case in enumerate(cases):
            shape = (case.rows, case.size // case.inner, case.inner) if case.rows else (case.size,)
            self.tensors.append(self._make(shape, 10 * i))
            for j, bad in enumerate((math.inf, math.nan), start=1):
                self.tensors[-1]["grad"].view(-1)[j : j + 1] = bad
                for name in self.NAMES[2:]:  # moments of an element that never had a gradient
                    self.tensors[-1][name].view(-1)[j : j + 1] = 0
            self.gains.append(self._make((), 10 * i + 5) if case.gain else None)
        self.scalars = torch.tensor([0.07, 0.8, *[1.0, 0.3, 1e-4, 0.6][:profiles]], dtype=torch.float64)

    def _make(self, shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
        made = {
            name: emulated.random_tensor(*shape, dtype=F32, seed=seed + k, scale=1 if k == 0 else 0.1)
            for k, name in enumerate(self.NAMES)
        }
        made["exp_avg_sq"].abs_()
        for k in range(self.profiles):
            scale = 1000 if k == 0 else 1  # the first average's weight is 1: nothing is left of what it was
            made[f"ema{k}"] = emulated.random_tensor(*shape, dtype=F32, seed=seed + 50 + k, scale=scale)
        return made


def run(library: Library, state: State, effective: bool, force: bool, out_dtype: torch.dtype) -> list[Tensor]:
    """Everything that a step writes, by case: parameter, moments, averages, the gain's, count, effective weight."""
    kept, flat, emas, gain_emas, numbers = [], [], [], [], []

    def place(values: "Tensor | int", dtype: torch.dtype, offset: int = 0) -> Tensor:
        kept.append(Guarded(values, dtype, offset))
        return kept[-1].tensor

    results: list[Tensor] = []
    for case, tensors, gain in zip(state.cases, state.tensors, state.gains, strict=True):
        own = {name: place(t, F32, case.offset) for name, t in tensors.items()}
        gains = {name: place(t, F32) for name, t in gain.items()} if gain else {}
        prepared = place(max(case.rows, 1) * case.size, out_dtype, case.offset) if case.rows and case.prepared else None
        count = torch.zeros(1, dtype=torch.int64)
        dots = place(case.rows + 3, F32) if gain and effective else None
        # With raw gradients the gain is a parameter beside the others.
        flat += [*(own[name] for name in State.NAMES), count, prepared, gains.get("param"), gains.get("exp_avg")]
        flat += [gains.get("exp_avg_sq"), dots]
        emas += [own[f"ema{k}"] for k in range(state.profiles)]
        gain_emas += [gains.get(f"ema{k}") for k in range(state.profiles)]
        numbers += [case.rows or 1, case.size, case.inner, int(case.rows > 0)]
        written = [own[name].reshape(tensors[name].shape) for name in own if name != "grad"]
        if gain and effective:
            written += [gains[name] for name in gains if name != "grad"]
        if prepared is not None:
            rows, outer, inner = tensors["param"].shape
            written.append(prepared.reshape(rows, inner, outer).transpose(1, 2))
        results += [*written, count]
    library.call(
        "adam_step",
        pointers(flat),
        pointers(emas),
        pointers(gain_emas),
        (ctypes.c_int64 * len(numbers))(*numbers),
        len(state.cases),
        state.scalars,
        state.loss_scale,
        state.profiles,
        out_dtype,
        *BETAS,
        EPS,
        reference.EPS,
        effective,
        force,
    )
    for guarded in kept:
        guarded.check_margins()
    return results


def expected(state: State, dtype: torch.dtype, effective: bool, force: bool, out_dtype: torch.dtype) -> list[Tensor]:
    """The same in plain torch of the given dtype."""
    own = [{name: t.to(dtype, copy=True) for name, t in tensors.items()} for tensors in state.tensors]
    gains = [None if g is None else {name: t.to(dtype, copy=True) for name, t in g.items()} for g in state.gains]
    every = own + [gain for gain in gains if gain is not None]
    place = {id(tensors): i for i, tensors in enumerate(every)}
    counts = torch.zeros(len(every), dtype=torch.int64)
    prepared = [
        torch.zeros_like(tensors["param"], dtype=out_dtype) if case.rows and case.prepared else None
        for case, tensors in zip(state.cases, own, strict=True)
    ] + [None] * (len(every) - len(own))
    before = {id(gain): {name: t.clone() for name, t in gain.items()} for gain in gains if gain is not None}
    reference.adam_step_(
        [t["param"] for t in every],
        [t["grad"] for t in own] + [None] * (len(every) - len(own)),
        [t["exp_avg"] for t in every],
        [t["exp_avg_sq"] for t in every],
        emas=[[t[f"ema{k}"] for t in every] for k in range(state.profiles)],
        weights=[case.rows > 0 for case in state.cases] + [False] * (len(every) - len(own)),
        gains=[-1 if gain is None else place[id(gain)] for gain in gains] + [-1] * (len(every) - len(own)),
        prepared=prepared,
        counters=range(len(every)),
        scalars=state.scalars,
        loss_scale=state.loss_scale,
        nonfinite=counts,
        betas=BETAS,
        eps=EPS,
        effective=effective,
        force=force,
    )
    results = []
    for i, (tensors, gain) in enumerate(zip(own, gains, strict=True)):
        results += [tensors[name] for name in tensors if name != "grad"]
        if gain is not None and effective:
            results += [gain[name] for name in gain if name != "grad"]
        if gain is not None and not effective:
            assert all(torch.equal(gain[name], before[id(gain)][name]) for name in gain)
        if prepared[i] is not None:
            results.append(prepared[i])
        results.append(counts[i : i + 1])
    return results


def compare(state: State, effective: bool, results: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """Raises AssertionError unless the results are as accurate as plain torch's, and counts equal. What the gains have
    is compared as one vector: their gradients are sums that cancel, and one number's error in plain torch may happen to
    be 0."""
    names = []
    for case in state.cases:
        own = ["param", "exp_avg", "exp_avg_sq", *(f"ema{k}" for k in range(state.profiles))]
        names += [f"{name} of {case}" for name in own]
        if case.gain and effective:
            names += [f"{name} of the gains" for name in own]
        names += [f"{name} of {case}" for name in (["prepared"] if case.rows and case.prepared else []) + ["count"]]
    for name in set(names):
        result, low, high = (
            torch.cat([t.flatten() for n, t in zip(names, tensors, strict=True) if n == name])
            for tensors in (results, plain, exact)
        )
        if result.dtype == torch.int64:
            assert torch.equal(result, high), name
        else:
            emulated.assert_as_accurate(result, low, high, name)


def check(
    library: Library,
    cases: Sequence[Case],
    effective: bool,
    force: bool,
    profiles: int = 2,
    out_dtype: torch.dtype = F32,
    loss_scale: float | None = None,
) -> None:
    """A step under all schedules."""
    state = State(cases, profiles, loss_scale)
    results = emulated.under_all_schedules(library, partial(run, library, state, effective, force, out_dtype))
    plain = expected(state, F32, effective, force, out_dtype)
    exact = expected(state, torch.float64, effective, force, torch.float64)
    compare(state, effective, results, plain, exact)


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("adam_step")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("effective", [False, True])
def test_matches_reference(library: Library, effective: bool, force: bool):
    check(library, CASES, effective, force)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("effective", [False, True])
def test_low_precision_effective_weights(library: Library, effective: bool, out_dtype: torch.dtype):
    check(library, CASES[:11], effective, force=True, out_dtype=out_dtype)


@pytest.mark.parametrize("profiles", [0, 1, 4])
def test_profiles_and_loss_scale(library: Library, profiles: int):
    check(library, CASES[:11], effective=True, force=True, profiles=profiles, loss_scale=1024.0)


@pytest.mark.parametrize("number", range(7))
def test_one_misaligned_tensor(library: Library, number: int):
    """Quads need the parameter, its gradient, moments, averages and the effective weight aligned."""
    with emulated.misaligned(number):
        check(library, [Case(9, 128)], effective=True, force=True)


@pytest.mark.parametrize(
    ("count", "profiles", "launches"), [(1, 2, 2), (250, 0, 2), (251, 0, 4), (200, 2, 2), (201, 2, 4)]
)
def test_table_limits(library: Library, count: int, profiles: int, launches: int):
    """With gains, a table holds 250 tensors and 800 pointers, two more than the profiles for each."""
    cases = [Case(1, 4, gain=True)] * count
    state = State(cases, profiles, None)
    library.schedule("forward", "forward", 0)
    before = library.launches()
    results = run(library, state, True, True, F32)
    assert library.launches() - before == launches
    compare(state, True, results, *(expected(state, dtype, True, True, dtype) for dtype in (F32, torch.float64)))


@pytest.mark.parametrize("numbers", [(1 << 31, 4, 1, 1), (1, 1 << 31, 1, 1), (1 << 22, 1 << 22, 1, 0)], ids=str)
def test_what_a_table_cannot_number_is_refused(library: Library, numbers: tuple[int, ...]):
    """Rows, their size, and plain parameters, which are cut into rows of 4096."""
    before = library.launches()
    arrays = (pointers([None] * 10), pointers([None]), pointers([None]), (ctypes.c_int64 * 4)(*numbers))
    scalars = torch.ones(2, dtype=torch.float64)
    with pytest.raises(emulated.KernelFault, match="error 1"):
        library.call("adam_step", *arrays, 1, scalars, None, 0, F32, *BETAS, EPS, reference.EPS, True, True)
    assert library.launches() == before


def test_rows_are_held_in_shared_memory(library: Library):
    """With effective gradients weight and gradient, else the weight; but nothing of plain parameters."""
    for cases, effective, floats in (
        ([Case(2, 12)], True, 2 * 4096),
        ([Case(2, 12)], False, 4096),
        ([Case(1, 5000)], True, 2 * 5000),
        ([Case(0, 5000)], True, 0),
    ):
        run(library, State(cases, 1, None), effective, True, F32)
        assert library.dynamic_shared() == 4 * floats


def test_one_launch_without_gains(library: Library):
    before = library.launches()
    run(library, State([Case(3, 8), Case(0, 5)], 2, None), True, True, F32)
    assert library.launches() - before == 1
    run(library, State([Case(3, 8, gain=True)], 2, None), False, True, F32)
    assert library.launches() - before == 3
