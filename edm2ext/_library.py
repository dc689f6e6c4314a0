"""Finds and loads the native libraries: libedm2_ops.so (the ops) and _C (build facts, optional)."""

import ctypes
import functools
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

LIBRARY_NAME = "libedm2_ops.so"
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "CUDA"}


def _find() -> Path | None:
    # An editable install keeps the Python files and the compiled ones in two folders, both of them in __path__.
    folders = (Path(folder) for folder in sys.modules["edm2ext"].__path__)
    return next((folder / LIBRARY_NAME for folder in folders if (folder / LIBRARY_NAME).is_file()), None)


def _load(path: Path | None) -> str:
    """Load the ops; returns why that failed, or an empty string."""
    if path is None:
        return f"{LIBRARY_NAME} was not found in {', '.join(sys.modules['edm2ext'].__path__)}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path} could not be loaded under torch {torch.__version__}: {error}"
    return ""


def _import_c() -> tuple[ModuleType | None, str]:
    try:
        from edm2ext import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, str(error)
    return _C, ""


PATH = _find()
REASON = _load(PATH)
LOADED = not REASON
_C, _C_REASON = _import_c()


def _toolkit_version() -> tuple[int, int] | None:
    """CUDA toolkit the library was built with; None if it holds no CUDA kernels."""
    if not LOADED:
        return None
    number = ctypes.CDLL(str(PATH)).edm2_cuda_toolkit_version()
    return (number // 1000, number % 1000 // 10) if number else None


@functools.cache
def _driver_version() -> tuple[int, int] | None:
    """Newest CUDA version the driver of this machine supports; None if there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


@functools.cache
def cuda_obstacle() -> str:
    """Why the CUDA kernels cannot be used in this process; empty if they can."""
    if not LOADED:
        return REASON
    toolkit = _toolkit_version()
    if toolkit is None:
        return f"compiled without CUDA: {_C.build_info()['cuda_reason']}" if _C else "compiled without CUDA"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    driver = _driver_version()
    if driver is None:
        return "no NVIDIA driver"
    if driver < toolkit:
        return f"the driver supports CUDA {_dotted(driver)}, older than the toolkit {_dotted(toolkit)} of the build"
    return ""


def _compiled_archs() -> tuple[str, ...]:
    """GPU architectures of the CUDA kernels in the library, such as "80" or "90a"."""
    if not LOADED:
        return ()
    function = ctypes.CDLL(str(PATH)).edm2_cuda_architectures
    function.restype = ctypes.c_char_p
    return tuple(filter(None, function().decode().split(",")))


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for sm_`arch` runs on a GPU of the given compute capability; the library holds no PTX.

    Code runs on its own and later revisions of the same generation (but not on Tegra's, which stand apart), with suffix
    "a" on that revision only.
    """
    match = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
    if match is None:
        return False
    own = int(match[1]), int(match[2])
    if own == capability:
        return True
    tegra = {(8, 7), (10, 1), (11, 0)}
    return match[3] != "a" and own[0] == capability[0] and own[1] < capability[1] and not tegra & {own, capability}


@functools.cache
def _capabilities() -> tuple[tuple[int, int], ...]:
    """Compute capability of every GPU that this process sees. Asks the driver, which makes no context for that."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, device, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for index in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), index)
        numbers = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            numbers.append(number.value)
        found.append((numbers[0], numbers[1]))
    return tuple(found)


def gpu_obstacle(index: int) -> str:
    """Why the kernels cannot run on the GPU of that index, given that CUDA kernels can be used; empty if they can."""
    capabilities = _capabilities()
    if index >= len(capabilities):
        return f"the driver knows no GPU {index}"
    own, archs = capabilities[index], _compiled_archs()
    if any(_runs_on(arch, own) for arch in archs):
        return ""
    return f"cuda:{index} has compute capability {_dotted(own)}, the library kernels for {', '.join(archs)}"


_runs_on_gpu: dict[int, bool] = {}


def runs_on_gpu(index: int) -> bool:
    """Whether the library holds code for the GPU of that index. Asked once for each."""
    if index not in _runs_on_gpu:
        _runs_on_gpu[index] = not gpu_obstacle(index)
    return _runs_on_gpu[index]


# What torch.compiler.assume_constant_result does without importing the compiler, which calls it and keeps the answer.
runs_on_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def has_kernel(op: str, device: str) -> bool:
    """Whether the native op has a kernel for a device type that can be used in this process.

    "cpu", "cuda", or "meta": whether the library holds a CUDA kernel at all.
    """
    if not LOADED or device not in _DISPATCH_KEYS or (device == "cuda" and cuda_obstacle()):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"edm2::{op}", _DISPATCH_KEYS[device])


def _dotted(version: tuple[int, int] | None) -> str | None:
    return None if version is None else f"{version[0]}.{version[1]}"


def _cpu_isa() -> str:
    if _C is None:
        return "unknown"
    try:
        return _C.cpu_isa()
    except RuntimeError as error:
        return str(error)


def _cuda_reason() -> str:
    """Why the CUDA kernels cannot be used in this process, on none of its GPUs; empty if they can."""
    reasons = [gpu_obstacle(index) for index in range(len(_capabilities()))] if not cuda_obstacle() else []
    return cuda_obstacle() or ("; ".join(reasons) if all(reasons) else "")


def build_info() -> dict[str, object]:
    """What was built and loaded, and why.

    Keys: `native` (is the library loaded), `reason` (why not, else empty), `library` (its path), `torch` (version
    running), `cpu_isa` (instruction set of the CPU kernels in use), `cpu_bf16` (instructions by which the CPU
    multiplies bfloat16 fastest: "amx_bf16", "avx512_bf16" or empty), `cuda` (can the CUDA kernels be used),
    `cuda_reason` (why not, else empty), `cuda_compiled`, `cuda_toolkit`, `cuda_driver`, `cuda_archs`, `cuda_gpus` (for
    every GPU of this process why the kernels cannot run on it: an empty string where they can), and `build`: the facts
    recorded when the library was built, or why they cannot be read.
    """
    build = _C.build_info() if _C else None
    return {
        "native": LOADED,
        "reason": REASON,
        "library": str(PATH) if PATH else None,
        "torch": torch.__version__,
        "cpu_isa": _cpu_isa(),
        "cpu_bf16": _C.cpu_bf16() if _C else "",
        "cuda": not _cuda_reason(),
        "cuda_reason": _cuda_reason(),
        "cuda_compiled": _toolkit_version() is not None,
        "cuda_toolkit": _dotted(_toolkit_version()),
        "cuda_driver": _dotted(_driver_version()),
        "cuda_archs": ";".join(_compiled_archs()) or None,
        "cuda_gpus": {f"cuda:{i}": cuda_obstacle() or gpu_obstacle(i) for i in range(len(_capabilities()))},
        "build": build if build else f"edm2ext._C: {_C_REASON}",
    }
