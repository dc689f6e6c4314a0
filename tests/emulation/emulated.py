"""Builds the CUDA kernels with g++ against the emulator, and calls them on CPU tensors."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import itertools
import math
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = Path(os.environ.get("EDM2EXT_EMULATED_SOURCES", ROOT))  # holds csrc: the repository, or a copy with a fault
BUILD = Path(os.environ.get("EDM2EXT_EMULATION_BUILD", ROOT / "build" / "emulation"))
_TORCH = Path(torch.__file__).parent
DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}  # edm2::DType, those with kernels

# Thread order, block order, seed: each hides other races.
SCHEDULES = [("forward", "forward", 0), ("reverse", "interleaved", 0), ("random", "reverse", 1)]
RUNS = (len(SCHEDULES), len(SCHEDULES) + 1)  # that under_all_schedules makes
_THREAD_ORDERS = ["forward", "reverse", "random"]
_BLOCK_ORDERS = ["forward", "reverse", "interleaved"]

# AddressSanitizer must be in the process before anything else: a test runs such libraries in a process of their own.
SANITIZED = bool(os.environ.get("EDM2EXT_EMULATION_SANITIZED"))
# Without sanitizers, the emulator itself answers when a pointer is not aligned for what it points to, or an index is
# beyond its array.
_CHECKS = ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=alignment,bounds"]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
# Libraries with the same templates live in one process: without -fno-gnu-unique they would share their shared memory.
_FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-fno-gnu-unique"]
_FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


_INCLUDED = {".h", ".cuh", ".cu"}


class KernelFault(Exception):
    """The emulator found a fault, or a launch was refused."""


def _compiler() -> list[str]:
    return ["g++", *_FLAGS, *(_SANITIZERS if SANITIZED else [])]


def _compile(command: list[str], sources: Sequence[Path], name: str, suffix: str) -> Path:
    """Runs `command -o <file>` unless that file exists; its name holds a hash of the command and of all sources."""
    digest = hashlib.sha256(" ".join(command).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = BUILD / f"{name}-{digest.hexdigest()[:16]}{suffix}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in other processes wait instead of compiling the same
        if not target.exists():
            partial = target.with_suffix(f".partial{suffix}")
            environment = {
                name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
            }  # not into the compiler
            subprocess.run([*command, "-o", str(partial)], check=True, timeout=300, env=environment)
            partial.replace(target)
    return target


def _object(name: str, root: Path) -> Path:
    """Compiles tests/emulation/<name>.cpp, which includes kernels of `root`/csrc."""
    folders = [HERE, HERE / "include", *(root / "csrc" / part for part in ("cuda", "torch", "include/edm2"))]
    sources = [
        HERE / f"{name}.cpp",
        *(f for folder in folders for f in sorted(folder.iterdir()) if f.suffix in _INCLUDED),
    ]
    command = [*_compiler(), *([] if SANITIZED else _CHECKS), "-c", str(HERE / f"{name}.cpp")]
    command += [f"-I{folder}" for folder in (HERE, HERE / "include")]
    if name == "emulator":  # the same for every root
        sources = [HERE / f"emulator{suffix}" for suffix in (".cpp", ".h")] + [HERE / "fiber.h"]
        return _compile(command, sources, name, ".o")
    command += [f"-I{folder}" for folder in (root / "csrc", root / "csrc" / "include")]
    if name == "bindings":
        sources += sorted((root / "csrc" / "torch").glob("*.cpp"))
        command += ["-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        command += ["-isystem", str(_TORCH / "include")]
    return _compile(command, sources, name, ".o")


def build(*names: str, root: Path = SOURCES) -> Path:
    """Links the named tests/emulation/<name>.cpp, compiled with the kernels of `root`/csrc, with the emulator, once."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda name: _object(name, root), (*names, "emulator")))
    libraries = [f"-L{_TORCH / 'lib'}", "-ltorch_cpu"] if "bindings" in names else []
    command = [*_compiler(), "-shared", "-Wl,-Bsymbolic", *map(str, objects), *libraries]
    return _compile(command, objects, names[0], ".so")


class Library:
    """A compiled library of emulated kernels."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulation_message.restype = ctypes.c_char_p
        self._library.emulation_launches.restype = ctypes.c_int64
        self.schedule(*SCHEDULES[0])

    def schedule(self, threads: str, blocks: str, seed: int, multiprocessors: int = 1) -> None:
        """Sets the order of threads and blocks, and the number of multiprocessors that grids are chosen for."""
        self._library.emulation_configure(
            _THREAD_ORDERS.index(threads), _BLOCK_ORDERS.index(blocks), ctypes.c_uint64(seed), multiprocessors
        )

    def dynamic_shared(self) -> int:
        """Bytes of dynamic shared memory that the last launch had."""
        return self.int64("emulation_dynamic_shared")

    def launches(self) -> int:
        """Kernels launched so far."""
        return self._library.emulation_launches()

    def call(
        self, function: str, *arguments: "Tensor | int | bool | float | torch.dtype | ctypes.Array | None"
    ) -> None:
        """Calls a launcher, which gets integers as int64; raises KernelFault unless it returns cudaSuccess."""
        Guarded.made = 0
        error = getattr(self._library, function)(*map(_argument, arguments))
        if error != 0:
            message = self._library.emulation_message().decode()
            raise KernelFault(f"{function}: error {error}: {message}")

    def run(self, function: str, *arguments: "Tensor | int") -> None:
        """Calls a function that returns nothing."""
        getattr(self._library, function)(*map(_argument, arguments))

    def int64(self, function: str, *arguments: "int | bool") -> int:
        """Calls a function that returns an int64."""
        getattr(self._library, function).restype = ctypes.c_int64
        return getattr(self._library, function)(*map(_argument, arguments))


def _argument(value: object) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, torch.dtype):
        return ctypes.c_int(DTYPES.get(value, 1))
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return value


@functools.cache
def load(name: str, root: Path = SOURCES) -> Library:
    """The library for tests/emulation/<name>.cpp."""
    return Library(build(name, root=root))


# ---- tensors as the kernels get them ----

# Elements of NaN on both sides of every tensor: what a kernel reads there poisons its result, what it writes there is
# seen. AddressSanitizer watches the edges itself.
_MARGIN = 0 if SANITIZED else 64
_LITTLE = 20_000  # elements, over all schedules


class Guarded:
    """A flat tensor between margins, `offset` elements past a 16-byte boundary; as many NaNs or a copy of `values`."""

    made = 0  # since the last launch
    further = -1  # the number of the tensor that misaligned() places further
    walled = False  # see walled()
    elements = 0  # of all that were made

    def __init__(self, values: "Tensor | int", dtype: torch.dtype, offset: int = 0) -> None:
        offset += Guarded.made == Guarded.further
        Guarded.made += 1
        numel = values if isinstance(values, int) else values.numel()
        Guarded.elements += numel
        self._start = _MARGIN + offset
        if Guarded.walled:
            self._whole = _before_a_wall(self._start + numel, dtype).fill_(math.nan)
        else:
            self._whole = torch.full((self._start + numel + _MARGIN,), math.nan, dtype=dtype)
        self.tensor = self._whole[self._start : self._start + numel]
        if isinstance(values, Tensor):
            self.tensor.copy_(values.reshape(-1))

    def check_margins(self) -> None:
        """Raises AssertionError where a kernel wrote outside."""
        end = self._start + self.tensor.numel()
        assert self._whole[: self._start].isnan().all(), "written before the start"
        assert self._whole[end:].isnan().all(), "written past the end"


@contextlib.contextmanager
def misaligned(number: int) -> Iterator[None]:
    """Places one of the tensors that are guarded for each launch, the first being number 0, one element further."""
    Guarded.made, Guarded.further = 0, number
    try:
        yield
    finally:
        Guarded.further = -1


@contextlib.contextmanager
def walled() -> Iterator[None]:
    """Places what is guarded at the end of memory: an access beyond it, even one that comes to nothing, is a signal 11.

    Only tensors of a multiple of 16 bytes are aligned."""
    Guarded.walled = True
    try:
        yield
    finally:
        Guarded.walled = False


def _before_a_wall(numel: int, dtype: torch.dtype) -> Tensor:
    """Elements followed by a page that nobody may touch."""
    size = numel * dtype.itemsize
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    wall = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory, room)))
    if ctypes.CDLL(None).mprotect(wall, ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError("mprotect failed")
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=room - size)


def to_memory(x: Tensor, channels_last: bool) -> Tensor:
    """[N, C, P] -> flat, in the order the kernels see."""
    return (x.transpose(1, 2) if channels_last else x).reshape(-1)


def from_memory(flat: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """The inverse of to_memory."""
    n, c, p = shape
    return flat.reshape(n, p, c).transpose(1, 2) if channels_last else flat.reshape(n, c, p)


def random_tensor(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.5) -> Tensor:
    """Normally distributed values."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


# ---- comparison ----


def assert_as_accurate(out: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """|out - exact| <= 2 |plain - exact| + a rounding unit of out's dtype at the largest |exact|, in the maximum norm.

    `plain` is what plain torch computes in out's dtype, `exact` the same in float64.
    """
    if exact.numel() == 0:
        return
    largest = exact.abs().max().item()
    info = torch.finfo(out.dtype)
    unit = info.eps * 2.0 ** math.floor(math.log2(max(largest, info.tiny)))
    error = (out.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + unit
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def under_all_schedules(library: Library, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Runs under every schedule and returns the result, which must not differ in a single bit; and with little data
    once more at the end of memory."""
    results = []
    Guarded.elements = 0
    for schedule, multiprocessors in zip(SCHEDULES, itertools.cycle([1, 2]), strict=False):
        library.schedule(*schedule, multiprocessors)
        results.append(run())
    for schedule, result in zip(SCHEDULES[1:], results[1:], strict=True):
        for i, (first, other) in enumerate(zip(results[0], result, strict=True)):
            same = torch.equal(first.nan_to_num(12345.0), other.nan_to_num(12345.0))
            assert same, f"output {i} under {schedule} differs from {SCHEDULES[0]}"
    if Guarded.elements <= _LITTLE and not SANITIZED:
        with walled():
            run()
    return results[0]
