"""The convolution on tensor cores: the CUDA kernels under emulation against plain torch."""

import ctypes
import itertools
import math
from functools import partial
from typing import NamedTuple

import emulated
import pytest
import torch
import torch.nn.functional as F
from emulated import Guarded, KernelFault, Library
from torch import Tensor

from edm2ext import reference

DTYPES = (torch.float16, torch.bfloat16)
FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(3)
TILES = range(4)


class Case(NamedTuple):
    """Batch, height, width, channels in and out, filter size."""

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int = 3
    s: int = 3

    @property
    def sizes(self) -> ctypes.Array:
        return (ctypes.c_int64 * 7)(*self)


class Plan(NamedTuple):
    tile: int
    splits: int = 1


def memory(x: Tensor) -> Tensor:
    """[A, B, H, W] flat in NHWC order."""
    return x.permute(0, 2, 3, 1).reshape(-1)


def image(flat: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The inverse of memory."""
    a, b, h, w = shape
    return flat.reshape(a, h, w, b).permute(0, 3, 1, 2)


def steps(case: Case, direction: int) -> int:
    """The most splits that there can be."""
    if direction == BACKWARD_WEIGHT:
        return -(-case.n * case.h * case.w // 32)
    return case.r * case.s * -(-(case.c if direction == FORWARD else case.k) // 32)


def workspace(case: Case, direction: int, plan: Plan) -> Guarded:
    pixels, taps = case.n * case.h * case.w, case.r * case.s
    sizes = {FORWARD: pixels * case.k, BACKWARD_INPUT: pixels * case.c, BACKWARD_WEIGHT: case.k * taps * case.c}
    return Guarded(plan.splits * sizes[direction] if plan.splits > 1 else 0, torch.float32)


def run(library: Library, direction: int, a: Tensor, b: Tensor, case: Case, plan: Plan) -> list[Tensor]:
    """The convolution of a = x with b = w, or a gradient: of x from a = grad_y and b = w, of w from grad_y and x.

    Splits the sum as planned, or into as many parts as it has.
    """
    if case.n > 0 and plan.splits <= 16:
        plan = plan._replace(splits=min(plan.splits, steps(case, direction)))
    function = ("mp_conv2d", "mp_conv2d_backward_input", "mp_conv2d_backward_weight")[direction]
    n, h, w, c, k, r, s = case
    shape = ((n, k, h, w), (n, c, h, w), (k, c, r, s))[direction]
    inputs = [Guarded(memory(t), t.dtype) for t in (a, b)]
    out = Guarded(math.prod(shape), torch.float32 if direction == BACKWARD_WEIGHT else a.dtype)
    parts = workspace(case, direction, plan)
    epilogue = (0, *[None] * 4, 0.0, 0.0, 0.0) if direction == FORWARD else ()
    tensors = (inputs[0].tensor, inputs[1].tensor, out.tensor)
    library.call(function, *tensors, case.sizes, a.dtype, *plan, parts.tensor, *epilogue)
    out.check_margins()
    parts.check_margins()
    return [image(out.tensor, shape)]


def operands(case: Case, dtype: torch.dtype, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and grad_y; of whole numbers small enough for every sum to be exact."""
    shapes = ((case.n, case.c, case.h, case.w), (case.k, case.c, case.r, case.s), (case.n, case.k, case.h, case.w))
    if not whole:
        scales = (1.0, (case.c * case.r * case.s) ** -0.5, 1.0)
        pairs = zip(shapes, scales, strict=True)
        x, w, g = (emulated.random_tensor(*s, dtype=dtype, seed=i, scale=f) for i, (s, f) in enumerate(pairs))
    else:
        generator = torch.Generator().manual_seed(0)
        x, w, g = (torch.randint(-1, 2, s, generator=generator).to(dtype) for s in shapes)
    return x, w, g


def plain(direction: int, a: Tensor, b: Tensor, case: Case) -> Tensor:
    """What plain torch computes."""
    padding = (case.r // 2, case.s // 2)
    if direction == FORWARD:
        return F.conv2d(a, b, padding=padding)
    if direction == BACKWARD_INPUT:
        return torch.nn.grad.conv2d_input((case.n, case.c, case.h, case.w), b, a, padding=padding)
    return torch.nn.grad.conv2d_weight(b, (case.k, case.c, case.r, case.s), a, padding=padding)


def pairs(case: Case, dtype: torch.dtype, whole: bool) -> list[tuple[Tensor, Tensor]]:
    """The operands of each direction."""
    x, w, g = operands(case, dtype, whole)
    return [(x, w), (g, w), (g, x)]


def check_exactly(library: Library, case: Case, plan: Plan, directions: tuple[int, ...] = (0, 1, 2)) -> None:
    """Whole numbers: equality, under all schedules."""
    for direction in directions:
        a, b = pairs(case, torch.float16, whole=True)[direction]
        expected = plain(direction, a.float(), b.float(), case)
        assert expected.abs().max() < 2048  # exact in float16
        (out,) = emulated.under_all_schedules(library, partial(run, library, direction, a, b, case, plan))
        assert torch.equal(out.float(), expected), f"direction {direction}, {case}, {plan}"


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("mp_conv2d")


# What the sizes are there for. A step is 32 deep; the smallest tile is 64 x 64.
CASES = [
    Case(1, 1, 1, 8, 8),  # of nine taps one is inside
    Case(2, 3, 5, 8, 16),  # padding on all sides of every image
    Case(1, 7, 1, 40, 24),  # a step and a quarter; a width of 1
    Case(3, 5, 7, 32, 72),  # images that end within a tile; more columns than the smallest tile
    Case(1, 9, 9, 72, 40, 1, 1),  # no padding
    Case(1, 6, 5, 16, 8, 5, 3),
    Case(1, 5, 6, 8, 8, 1, 5),
]
MANY_TILES = {0: Case(1, 19, 15, 8, 136, 1, 1), 1: Case(1, 12, 11, 16, 200), 2: Case(1, 12, 11, 8, 136)}
MANY_TILES[3] = Case(2, 9, 8, 72, 72)  # and the most stages in use


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_numbers_exactly(library: Library, case: Case):
    check_exactly(library, case, Plan(3))


@pytest.mark.parametrize("tile", TILES)
def test_every_tile(library: Library, tile: int):
    check_exactly(library, CASES[3], Plan(tile, 2))
    check_exactly(library, MANY_TILES[tile], Plan(tile))


@pytest.mark.parametrize("splits", [2, 3, 5])
def test_split_sums(library: Library, splits: int):
    for case in (CASES[2], MANY_TILES[3]):
        check_exactly(library, case, Plan(3, splits))


def test_as_many_splits_as_steps(library: Library):
    check_exactly(library, CASES[3], Plan(3, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [Plan(3), Plan(2, 3), Plan(1), Plan(0, 2)], ids=str)
def test_accuracy(library: Library, plan: Plan, dtype: torch.dtype):
    case = Case(2, 5, 6, 40, 48)
    library.schedule(*emulated.SCHEDULES[0])
    for direction, (a, b) in enumerate(pairs(case, dtype, whole=False)):
        (out,) = run(library, direction, a, b, case, plan)
        exact = plain(direction, a.double(), b.double(), case)
        low = plain(direction, a.float(), b.float(), case).to(out.dtype)
        emulated.assert_as_accurate(out, low, exact, f"direction {direction}, {dtype}, {plan}")


def test_not_a_number_reaches_those_who_see_it(library: Library):
    case = Case(1, 6, 6, 8, 8)
    x, w, _ = operands(case, torch.float16, whole=True)
    x[0, 3, 2, 2] = math.nan
    library.schedule(*emulated.SCHEDULES[0])
    (y,) = run(library, FORWARD, x, w.fill_(1), case, Plan(3))
    seen = torch.zeros(6, 6, dtype=torch.bool)
    seen[1:4, 1:4] = True
    assert torch.equal(y.isnan(), seen.expand(1, 8, 6, 6))


def test_no_two_rows_of_a_matrix_lie_in_the_same_banks(library: Library):
    """Over all that this file runs: of 64 lanes of 16 bytes, those that a load brings at once."""
    for tile in TILES:
        for direction, (a, b) in enumerate(pairs(CASES[3], torch.float16, whole=True)):
            run(library, direction, a, b, CASES[3], Plan(tile))
    assert library.int64("bank_reads") > 10_000
    assert library.int64("bank_conflicts") == 0


# ---- epilogues ----

NONE, GAIN, MODULATED_SILU, SUM = range(4)
UNTOUCHED = 0b10100101


class Epilogue(NamedTuple):
    """The arguments of one."""

    kind: int
    gain: float = 0.0
    t: float = 0.0
    clip: float = math.inf


def finished(
    library: Library, case: Case, dtype: torch.dtype, plan: Plan, epilogue: Epilogue, keep: bool = True
) -> list[Tensor]:
    """y, if it is kept, out, if there is one, the bits of its mask, if it is a sum and y is not kept; c and skip."""
    x, w, skip = operands(case, dtype, whole=False)
    c = emulated.random_tensor(case.n, case.k, dtype=dtype, seed=5)
    shape = (case.n, case.k, case.h, case.w)
    y, out = (Guarded(math.prod(shape), dtype) for _ in range(2))
    mask = torch.full([math.prod(shape) // 8 + 1], UNTOUCHED, dtype=torch.uint8)
    k = math.hypot(1 - epilogue.t, epilogue.t)
    inputs = [Guarded(memory(t), dtype) for t in (x, w, skip)]
    more = [
        out.tensor if epilogue.kind in (MODULATED_SILU, SUM) else None,
        torch.tensor(epilogue.gain) if epilogue.kind == GAIN else None,
        Guarded(c, dtype).tensor if epilogue.kind == MODULATED_SILU else None,
        inputs[2].tensor if epilogue.kind == SUM else None,
    ]
    numbers = ((1 - epilogue.t) / k, epilogue.t / k, epilogue.clip)
    sizes = (case.sizes, dtype, *plan, workspace(case, FORWARD, plan).tensor)
    kept = y.tensor if keep else None
    masked = mask if epilogue.kind == SUM and not keep else None
    library.call("mp_conv2d", inputs[0].tensor, inputs[1].tensor, kept, *sizes, epilogue.kind, *more, *numbers, masked)
    y.check_margins()
    out.check_margins()
    assert mask[-1] == UNTOUCHED
    bits = (mask[:-1, None] >> torch.arange(8) & 1).bool().flatten()
    return [image(y.tensor, shape), image(out.tensor, shape), image(bits, shape), c, skip]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [Plan(3), Plan(3, 3), Plan(1)], ids=str)
def test_epilogues(library: Library, plan: Plan, dtype: torch.dtype):
    """y is that without an epilogue, and out what plain torch makes of it."""
    case = Case(3, 5, 3, 24, 72)
    library.schedule(*emulated.SCHEDULES[0])
    run_one = partial(finished, library, case, dtype, plan)
    plain_y = run_one(Epilogue(NONE))[0]
    x, w, _ = operands(case, dtype, whole=False)
    (scaled, *_) = run_one(Epilogue(GAIN, gain=0.3))
    exact = plain(FORWARD, x.double(), w.double(), case) * 0.3
    low = (plain(FORWARD, x.float(), w.float(), case) * 0.3).to(dtype)
    emulated.assert_as_accurate(scaled, low, exact, "gain")
    silu, clipped = Epilogue(MODULATED_SILU), Epilogue(SUM, t=0.3, clip=1.5)
    for epilogue in (silu, clipped, Epilogue(SUM, t=0.5)):
        y, out, _, c, skip = run_one(epilogue)
        assert torch.equal(y, plain_y)
        if epilogue == silu:
            function = lambda y: reference.mp_silu_modulated(y, c.to(y.dtype))  # noqa: B023, E731
        else:
            function = lambda y: reference.mp_sum(skip.to(y.dtype), y, t=epilogue.t, clip=epilogue.clip)  # noqa: B023, E731
        emulated.assert_as_accurate(out, function(y), function(y.double()), f"{epilogue}")
        not_kept, same, mask, *_ = run_one(epilogue, keep=False)
        assert torch.equal(same, out)
        assert not_kept.isnan().all()
        if epilogue != silu:
            passes = reference.mp_sum(skip.double(), y.double(), t=epilogue.t).abs() <= epilogue.clip
            assert torch.equal(mask, passes)
            assert epilogue != clipped or 0 < (same.abs() == 1.5).logical_and(mask).sum() < (~mask).sum()


QKV_PLAN = Plan(1)


def with_heads(library: Library, case: Case, a: Tensor, b: Tensor, plan: Plan = QKV_PLAN, keep: bool = True):
    """q, k and v [N, pixels, heads, 64], and y if it is kept."""
    heads = case.k // 192
    y = Guarded(case.n * case.h * case.w * case.k, a.dtype)
    parts = [Guarded(case.n * case.h * case.w * heads * 64, a.dtype) for _ in range(3)]
    inputs = [Guarded(memory(t), t.dtype) for t in (a, b)]
    sizes = (case.sizes, a.dtype, *plan, workspace(case, FORWARD, plan).tensor)
    kept = y.tensor if keep else None
    outputs = (part.tensor for part in parts)
    library.call("mp_conv2d_qkv_norm", inputs[0].tensor, inputs[1].tensor, kept, *sizes, *outputs, 1e-4)
    for guarded in (y, *parts):
        guarded.check_margins()
    parts = [part.tensor.reshape(case.n, case.h * case.w, heads, 64) for part in parts]
    return [*parts, image(y.tensor, (case.n, case.k, case.h, case.w))]


@pytest.mark.parametrize("case", [Case(1, 3, 3, 8, 192, 1, 1), Case(3, 9, 5, 40, 384, 1, 1), Case(1, 4, 5, 8, 192)])
def test_heads_are_where_they_belong(library: Library, case: Case):
    """Exactly: y is whole numbers, and so are all sums of squares."""
    x = torch.zeros(case.n, case.c, case.h, case.w, dtype=torch.float16)
    w = torch.zeros(case.k, case.c, case.r, case.s, dtype=torch.float16)
    pixels = torch.arange(case.n * case.h * case.w).reshape(case.n, case.h, case.w)
    x[:, 0], x[:, 1] = pixels % 3 - 1, pixels % 2
    signs = torch.randint(0, 2, (case.k,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    w[:, 0, case.r // 2, case.s // 2] = signs.half() * (1 + torch.arange(case.k) % 3)
    for keep in (True, False):
        (*parts, y) = emulated.under_all_schedules(
            library,
            lambda: with_heads(library, case, x, w, keep=keep),  # noqa: B023
        )
        expected = plain(FORWARD, x.float(), w.float(), case)
        assert torch.equal(y.float(), expected) if keep else y.isnan().all()
        apart = expected.reshape(case.n, case.k // 192, 64, 3, case.h * case.w).permute(3, 0, 4, 1, 2)
        for part, values in zip(parts, apart, strict=True):
            scale = 1e-4 + values.square().mean(-1, keepdim=True).sqrt()
            assert torch.equal(part, (values * (1 / scale)).half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_those_of_qkv_norm(library: Library, dtype: torch.dtype):
    """The same bits as the kernel that takes y apart."""
    case = Case(2, 7, 11, 72, 384, 1, 1)
    x, w, _ = operands(case, dtype, whole=False)
    library.schedule(*emulated.SCHEDULES[0])
    *parts, y = with_heads(library, case, x, w)
    assert torch.equal(y, run(library, FORWARD, x, w, case, QKV_PLAN)[0])
    separate = emulated.load("cosine_attention")
    separate.schedule(*emulated.SCHEDULES[0])
    outputs = [torch.empty_like(part) for part in parts]
    shape = (case.n, case.k, case.h * case.w, True)
    separate.call("qkv_norm", memory(y), *outputs, *shape, 2, 64, dtype, 1e-4)
    for part, expected in zip(parts, outputs, strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("plan", [Plan(0), Plan(3), Plan(1, 2)])
def test_heads_want_a_tile_of_their_width_and_whole_sums(library: Library, plan: Plan):
    case = Case(1, 2, 2, 64, 192, 1, 1)
    x, w, _ = operands(case, torch.float16, whole=True)
    with pytest.raises(KernelFault, match="error 1"):
        with_heads(library, case, x, w, plan)
    with pytest.raises(KernelFault, match="error 1"):
        with_heads(library, case._replace(k=128), x, w[:128])


# ---- index arithmetic ----


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 8, 28, 63, 64, 65, 1000, 4097, 2**20 - 1, 2**30])
def test_division(library: Library, divisor: int):
    numbers = {n * divisor + d for n in (0, 1, 2, 1000, (2**31 - 1) // divisor) for d in (-1, 0, 1)} | {2**31 - 1}
    for number in sorted(n for n in numbers if 0 <= n < 2**31):
        assert library.int64("divided", number, divisor) == number // divisor


def test_taps_inside(library: Library):
    case = Case(2, 3, 4, 8, 8, 3, 5)
    for pixel in range(30):
        n, (row, column) = pixel // 12, divmod(pixel % 12, 4)
        places = [(row + r - 1, column + s - 2) for r in range(3) for s in range(5)]
        expected = sum(1 << i for i, (y, x) in enumerate(places) if n < 2 and 0 <= y < 3 and 0 <= x < 4)
        assert library.int64("taps_of", case.sizes, pixel) == expected


@pytest.mark.parametrize("packs", [4, 8, 16, 24, 32])
def test_packs_lie_apart_and_fill_the_tile(library: Library, packs: int):
    places = [[library.int64("pack_address", row, pack, packs) for pack in range(packs)] for row in range(32)]
    assert sorted(itertools.chain(*places)) == list(range(0, 32 * packs * 16, 16))
    for row, pack in itertools.product(range(0, 32, 8), range(packs)):
        assert len({places[row + i][pack] // 16 % 8 for i in range(8)}) == 8  # read together
    for row, pack in itertools.product(range(32), range(0, packs, 8)):
        together = places[row] + places[row ^ 1] if packs == 4 else places[row][pack : pack + 8]
        assert len({place // 16 % 8 for place in together}) == 8  # written together


# ---- how Hopper's kernels share out their work; the rest of them cannot be emulated ----


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT])
@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("case", [Case(2, 17, 19, 200, 392), Case(1, 8, 8, 64, 192, 1, 1), Case(9, 7, 5, 8, 520)])
def test_blocks_on_hopper_do_everything_once(library: Library, case: Case, tile: int, direction: int):
    n, h, w, c, k, r, s = case
    rows, columns = ((n * h * w, k), (n * h * w, c), (k, r * s * c))[direction]
    deep = (r * s * -(-c // 64), r * s * -(-k // 64), -(-n * h * w // 64))[direction]
    height, width, stages, shared = (library.int64("wgmma_tile_size", direction, tile, i) for i in range(4))
    assert stages >= 3
    assert shared <= 227 * 1024 - 1024
    for splits in {1, min(3, deep), deep}:
        works = (ctypes.c_int64 * 100_000)()
        count = library.int64("wgmma_works", direction, case.sizes, tile, splits, works)
        done: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for i in range(count):
            row, first, last, split, step, steps_done = works[6 * i : 6 * i + 6]
            assert row % height == 0
            assert 0 < last - first <= width
            assert last <= columns
            assert steps_done > 0
            if direction == BACKWARD_WEIGHT:
                assert first // c == (last - 1) // c  # within a tap
            done.setdefault((row, first), []).append((split, step, steps_done))
        starts = {row for row, _ in done}
        assert starts >= set(range(0, rows, height))
        assert len(starts) <= -(-rows // height) + 1
        for row in starts:
            edges = sorted(first for of, first in done if of == row)
            assert edges[0] == 0
            assert len(edges) == (r * s * -(-c // width) if direction == 2 else -(-columns // width))
        for parts in done.values():
            assert [split for split, _, _ in parts] == list(range(splits))
            assert [step for _, step, _ in parts] == [sum(n for _, _, n in parts[:i]) for i in range(splits)]
            assert sum(steps_done for _, _, steps_done in parts) == deep


# ---- plans and refusals ----


def test_plans(library: Library):
    """Large problems get large tiles and no splits; few pixels, and gradients of weights, are split."""
    large, small = Case(128, 64, 64, 192, 192), Case(8, 8, 8, 768, 768)
    tile, splits = divmod(library.int64("planned", FORWARD, large.sizes, 132), 1000)
    assert (tile, splits) == (1, 1)  # 192 columns
    tile, splits = divmod(library.int64("planned", FORWARD, small.sizes, 132), 1000)
    assert splits > 1
    tile, splits = divmod(library.int64("planned", BACKWARD_WEIGHT, large.sizes, 132), 1000)
    assert splits > 4


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT])
def test_only_split_sums_want_workspace(library: Library, direction: int):
    case = Case(2, 5, 7, 64, 72)
    sums = (70 * 72, 70 * 64, 72 * 9 * 64)[direction]
    for splits, floats in {1: 0, 2: 2 * sums, 3: 3 * sums}.items():
        assert library.int64("workspace_floats", direction, case.sizes, 3, splits) == floats


@pytest.mark.parametrize(
    ("case", "plan"),
    [
        (Case(1, 4, 4, 12, 8), Plan(3)),  # channels not a multiple of 8
        (Case(1, 4, 4, 8, 12), Plan(3)),
        (Case(1, 4, 4, 8, 8, 2, 3), Plan(3)),  # an even filter
        (Case(1, 4, 4, 8, 8, 7, 7), Plan(3)),  # more taps than bits
        (Case(1, 4, 4, 8, 8), Plan(4)),  # no such tile
        (Case(1, 4, 4, 8, 8), Plan(3, 17)),  # more splits than steps
        (Case(1, 4, 4, 8, 8), Plan(3, 0)),
    ],
    ids=str,
)
def test_refused(library: Library, case: Case, plan: Plan):
    x, w, _ = operands(case, torch.float16, whole=True)
    with pytest.raises(KernelFault, match="error 1"):
        run(library, FORWARD, x, w, case, plan)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, 2**24 + 8, 8, 1, 1),
        Case(1, 1, 1, 8, 2**24 + 8, 1, 1),
        Case(1, 1, 1, 8, 2**21, 3, 3),
        Case(1, 2**15, 2**15 + 1, 8, 8),
    ],
    ids=str,
)
def test_numbers_beyond_their_bits_are_refused(library: Library, case: Case):
    x = torch.zeros(8, dtype=torch.float16)  # is not touched
    with pytest.raises(KernelFault, match="error 1"):
        library.call("mp_conv2d", x, x, x, case.sizes, x.dtype, *Plan(3), x, 0, *[None] * 4, 0.0, 0.0, 0.0)


def test_no_images(library: Library):
    case = Case(0, 4, 4, 8, 8)
    x, w, g = operands(case, torch.float16, whole=True)
    before = library.launches()
    run(library, FORWARD, x, w, case, Plan(3))
    run(library, BACKWARD_INPUT, g, w, case, Plan(3))
    assert library.launches() == before
    assert torch.equal(run(library, BACKWARD_WEIGHT, g, x, case, Plan(3))[0], torch.zeros(w.shape))


# ---- of an MP-Cat's halves ----


class Halves(NamedTuple):
    """Batch, height, width, channels of a and of b, and out."""

    n: int
    h: int
    w: int
    a: int
    b: int
    k: int

    @property
    def whole(self) -> Case:
        return Case(self.n, self.h, self.w, self.a + self.b, self.k, 1, 1)


HALVES = [
    Halves(1, 1, 1, 32, 32, 8),  # one pixel
    Halves(3, 5, 7, 64, 32, 72),  # images and halves that end within tiles
    Halves(1, 9, 9, 32, 96, 40),
    Halves(2, 3, 4, 96, 128, 16),  # halves that meet within a tile of the weight's gradient, and beyond the first
]
WEIGHTS = (0.5, 2.0)  # sums stay exact


def run_halves(
    library: Library,
    direction: int,
    other: Tensor,
    a: Tensor,
    b: Tensor,
    case: Halves,
    plan: Plan,
    weights: tuple[float, float] = WEIGHTS,
) -> list[Tensor]:
    """The convolution with other = w, or the weight's gradient from other = grad_y."""
    whole = case.whole
    plan = plan._replace(splits=min(plan.splits, steps(whole, direction)))
    shape = (whole.n, whole.k, whole.h, whole.w) if direction == FORWARD else (whole.k, whole.c, 1, 1)
    out = Guarded(math.prod(shape), a.dtype if direction == FORWARD else torch.float32)
    parts = workspace(whole, direction, plan)
    a, b, other = (Guarded(memory(t), t.dtype).tensor for t in (a, b, other))
    sizes = (whole.sizes, a.dtype, *plan, parts.tensor)
    if direction == FORWARD:
        library.call("mp_cat_conv2d", a, b, other, out.tensor, *sizes, NONE, case.a, *weights)
    else:
        library.call("mp_cat_conv2d_backward_weight", other, a, b, out.tensor, *sizes, case.a, *weights)
    out.check_margins()
    parts.check_margins()
    return [image(out.tensor, shape)]


def halves_of(x: Tensor, case: Halves) -> tuple[Tensor, Tensor]:
    return x[:, : case.a].contiguous(), x[:, case.a :].contiguous()


def joined(a: Tensor, b: Tensor, weights: tuple[float, float] = WEIGHTS) -> Tensor:
    return torch.cat([a * weights[0], b * weights[1]], dim=1)


def check_halves_exactly(library: Library, case: Halves, plan: Plan) -> None:
    x, w, g = operands(case.whole, torch.float16, whole=True)
    a, b = halves_of(x, case)
    for direction, other in ((FORWARD, w), (BACKWARD_WEIGHT, g)):
        run = partial(run_halves, library, direction, other, a, b, case, plan)
        (out,) = emulated.under_all_schedules(library, run)
        whole = joined(a.float(), b.float())
        operands_of = (whole, w.float()) if direction == FORWARD else (g.float(), whole)
        expected = plain(direction, *operands_of, case.whole)
        assert expected.abs().max() < 1024  # exact in float16, halves too
        assert torch.equal(out.float(), expected), f"direction {direction}, {case}, {plan}"


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", HALVES, ids=str)
def test_halves_exactly(library: Library, case: Halves, tile: int):
    check_halves_exactly(library, case, Plan(tile))


@pytest.mark.parametrize("splits", [2, 3, 4, 7])
@pytest.mark.parametrize("tile", [1, 3])
def test_split_sums_of_halves(library: Library, tile: int, splits: int):
    """Parts that end in the first half, begin in the second, end where they meet, and hold some of both."""
    check_halves_exactly(library, HALVES[3], Plan(tile, splits))


def test_many_tiles_of_halves(library: Library):
    """More pixels, channels and outputs than a tile has."""
    for tile, case in ((0, Halves(1, 17, 16, 64, 96, 136)), (1, Halves(1, 12, 11, 160, 64, 200))):
        check_halves_exactly(library, case, Plan(tile))
    check_halves_exactly(library, Halves(2, 9, 8, 32, 64, 72), Plan(3, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [Plan(3), Plan(2, 3), Plan(1), Plan(0, 2)], ids=str)
def test_accuracy_of_halves(library: Library, plan: Plan, dtype: torch.dtype):
    """Not worse than the convolution of the concatenation, which rounds that."""
    case = Halves(2, 5, 6, 64, 96, 48)
    x, w, g = operands(case.whole, dtype, whole=False)
    a, b = halves_of(x, case)
    weights = reference.cat_scales(case.a, case.b, 0.3)
    library.schedule(*emulated.SCHEDULES[0])
    for direction, other in ((FORWARD, w), (BACKWARD_WEIGHT, g)):
        (out,) = run_halves(library, direction, other, a, b, case, plan, weights)
        exact, low = (
            plain(direction, *((x, o) if direction == FORWARD else (o, x)), case.whole)
            for x, o in (
                (joined(a.double(), b.double(), weights), other.double()),
                (joined(a, b, weights).float(), other.float()),
            )
        )
        emulated.assert_as_accurate(out, low.to(out.dtype), exact, f"direction {direction}, {dtype}, {plan}")


def test_not_a_number_in_a_half_reaches_its_pixel_and_columns(library: Library):
    case = Halves(1, 4, 4, 32, 64, 8)
    x, w, g = operands(case.whole, torch.float16, whole=True)
    x[0, 40, 1, 2] = math.nan
    library.schedule(*emulated.SCHEDULES[0])
    (y,) = run_halves(library, FORWARD, w.fill_(1), *halves_of(x, case), case, Plan(3))
    seen = torch.zeros(4, 4, dtype=torch.bool)
    seen[1, 2] = True
    assert torch.equal(y.isnan(), seen.expand(1, 8, 4, 4))
    (grad_w,) = run_halves(library, BACKWARD_WEIGHT, g, *halves_of(x, case), case, Plan(3))
    assert torch.equal(grad_w.isnan().flatten(1), (torch.arange(96) == 40).expand(8, 96))


@pytest.mark.parametrize(
    ("case", "plan"),
    [
        (Halves(1, 4, 4, 24, 40, 8), Plan(3)),  # a step would lie in both
        (Halves(1, 4, 4, 64, 0, 8), Plan(3)),
        (Halves(1, 4, 4, 0, 64, 8), Plan(3)),
        (Halves(1, 4, 4, 96, -32, 8), Plan(3)),
        (Halves(1, 4, 4, 32, 40, 8), Plan(3)),
        (Halves(1, 4, 4, 40, 32, 8), Plan(3)),
        (Halves(1, 4, 4, 32, 32, 8), Plan(4)),  # a tile for Hopper's own instructions
    ],
    ids=str,
)
def test_refused_halves(library: Library, case: Halves, plan: Plan):
    x, w, g = operands(case.whole, torch.float16, whole=True)
    nothing = torch.empty(0)
    for direction, other in (("", w), ("_backward_weight", g)):
        pointers = (x, x, other, x) if direction == "" else (other, x, x, w.float())
        sizes = (case.whole.sizes, x.dtype, *plan, nothing, *([NONE] if direction == "" else []), case.a, *WEIGHTS)
        with pytest.raises(KernelFault, match="error 1"):
            library.call(f"mp_cat_conv2d{direction}", *pointers, *sizes)


def test_halves_want_one_tap_and_nothing_that_follows(library: Library):
    case = Case(1, 4, 4, 64, 8)
    x, w, _ = operands(case, torch.float16, whole=True)
    out = torch.empty(1, 8, 4, 4, dtype=torch.float16)
    for kind, sizes in ((NONE, case.sizes), (MODULATED_SILU, case._replace(r=1, s=1).sizes)):
        with pytest.raises(KernelFault, match="error 1"):
            library.call("mp_cat_conv2d", x, x, w, out, sizes, x.dtype, *Plan(3), None, kind, 32, *WEIGHTS)
