"""The emulator itself: it runs what a GPU runs, and it finds what it is there to find."""

import math

import emulated
import pytest
import torch
from emulated import KernelFault, Library
from torch import Tensor


@pytest.fixture(scope="module")
def library() -> Library:
    return emulated.load("emulator_probe")


@pytest.fixture(params=emulated.SCHEDULES, ids=str)
def scheduled(request: pytest.FixtureRequest, library: Library) -> Library:
    library.schedule(*request.param)
    return library


def reversed_blocks(library: Library, barrier: bool) -> bool:
    """Whether a kernel that reverses through shared memory gives the right result."""
    data = torch.arange(256, dtype=torch.float32)
    library.call("probe_reverse", data, 4, barrier)
    return torch.equal(data, torch.arange(256.0).reshape(4, 64).flip(1).reshape(-1))


def test_every_thread_of_every_block_runs_once(scheduled: Library):
    out = torch.zeros(12 * 30, dtype=torch.int32)
    scheduled.call("probe_indices", out)
    blocks, threads = torch.arange(12)[:, None], torch.arange(30)
    assert torch.equal(out.reshape(12, 30).long(), 1000 * blocks + threads)


def test_shared_memory_and_barrier(scheduled: Library):
    assert reversed_blocks(scheduled, barrier=True)
    assert not reversed_blocks(scheduled, barrier=False)


def test_shared_memory_starts_as_nan(scheduled: Library):
    out = torch.zeros(32)
    scheduled.call("probe_read_unwritten_shared", out)
    assert out.isnan().all()


def test_dynamic_shared_memory(scheduled: Library):
    data = torch.arange(100.0)
    scheduled.call("probe_reverse_dynamic", data, 100, 400)
    assert torch.equal(data, torch.arange(100.0).flip(0))
    if not emulated.SANITIZED:
        with pytest.raises(KernelFault, match="block 0 wrote beyond its dynamic shared memory"):
            scheduled.call("probe_reverse_dynamic", torch.ones(100), 100, 396)
    with pytest.raises(KernelFault, match=r"error 9.* 48129 bytes of dynamic shared memory exceed the limit of 48128"):
        scheduled.call("probe_reverse_dynamic", data, 100, 48129)


def test_blocks_interleave_on_demand(library: Library):
    def seen(blocks: str) -> Tensor:
        library.schedule("forward", blocks, 0)
        data = torch.zeros(6)
        library.call("probe_read_other_block", data, 3)
        return data[3:]

    assert seen("forward").tolist() == [0, 0, 1]
    assert seen("reverse").tolist() == [1, 0, 0] or seen("reverse").tolist() == [1, 1, 0]
    assert seen("interleaved").tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ("barrier_in_branch", "waits for threads that have exited|never reaches the barrier"),
        ("two_barriers", "divergent barrier: .*emulator_probe.cpp"),
        ("barrier_after_exit", "waits for threads that have exited|never reaches the barrier"),
        ("shuffle_after_exit", "lane 5 in its mask, which has exited|is in the mask of"),
        ("shuffle_outside_mask", "is not in its own mask"),
        ("shuffle_in_partial_warp", "lane 8 in its mask, which has exited or never was"),
        ("barrier_against_shuffle", "deadlock: .*waits for threads that wait elsewhere"),
        ("two_shuffles", "divergent warp"),
    ],
)
def test_faults_are_found(scheduled: Library, probe: str, message: str):
    arguments = [torch.zeros(64)] if "shuffle" in probe else []
    with pytest.raises(KernelFault, match=message):
        scheduled.call(f"probe_{probe}", *arguments)
    assert reversed_blocks(scheduled, barrier=True), "the emulator did not recover"


@pytest.mark.skipif(emulated.SANITIZED, reason="the sanitizer ends the process")
def test_misaligned_access_is_found(library: Library):
    out = torch.zeros(361, dtype=torch.int32).view(torch.uint8)[1:]
    with pytest.raises(KernelFault, match=r"misaligned access at .*emulator_probe.cpp:\d+"):
        library.call("probe_indices", out)


@pytest.mark.skipif(emulated.SANITIZED, reason="the sanitizer ends the process")
def test_index_beyond_an_array_is_found(library: Library):
    out = torch.zeros(32)
    library.call("probe_array", out, 3)
    assert torch.equal(out, torch.arange(32) + 3.0)
    with pytest.raises(KernelFault, match=r"index 4 is beyond the array at .*emulator_probe.cpp:\d+"):
        library.call("probe_array", out, 4)


def test_impossible_launches_are_refused(library: Library):
    for grid_x, grid_y, block in [(0, 1, 32), (1, 65536, 32), (1, 1, 0), (1, 1, 1025)]:
        with pytest.raises(KernelFault, match=r"error 9: .*no GPU runs"):
            library.call("probe_launch", grid_x, grid_y, block)


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("argument", [0, 1, 3, 5, 8, 16])
def test_shuffles(scheduled: Library, argument: int, width: int):
    out = torch.zeros(4, 32, dtype=torch.int32)
    scheduled.call("probe_shuffles", out, argument, width)
    lane = torch.arange(32)
    segment = lane // width * width
    end = segment + width

    def inside(source: Tensor) -> Tensor:
        return torch.where((source >= segment) & (source < end), source, lane)

    xor = lane ^ argument
    expected = [segment + argument % width, torch.where(xor < end, xor, lane), inside(lane + argument)]
    assert torch.equal(out.long(), torch.stack([*expected, inside(lane - argument)]))


def test_masked_shuffles(scheduled: Library):
    out = torch.zeros(32)
    scheduled.call("probe_masked_shuffles", out)
    lane = torch.arange(32)
    assert torch.equal(out[::2], (lane[::2] ^ 2).float())
    assert out[1::2].isnan().all()


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions(library: Library, name: str, dtype: torch.dtype):
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    widened = torch.empty(65536)
    library.run(f"{name}_to_float", every, widened, 65536)
    assert torch.equal(widened.nan_to_num(1.5), every.float().nan_to_num(1.5))
    assert torch.equal(widened.isnan(), every.isnan())

    # Exactly representable values, the midpoints between neighbours, and a step to both sides of those.
    values = every.float()[every.float().isfinite()].sort().values
    midpoints = ((values[1:].double() + values[:-1].double()) / 2).float()
    limits = torch.tensor([65519.9, 65520.0, 1e30, 3.4e38, math.inf, math.nan])
    floats = torch.cat([values, midpoints, midpoints.nextafter(values[1:]), midpoints.nextafter(values[:-1]), limits])
    narrowed = torch.empty(floats.numel(), dtype=dtype)
    library.run(f"float_to_{name}", floats, narrowed, floats.numel())
    assert torch.equal(narrowed.isnan(), floats.isnan())
    assert torch.equal(
        narrowed.nan_to_num(0.0, torch.inf, -torch.inf), floats.to(dtype).nan_to_num(0.0, torch.inf, -torch.inf)
    )
