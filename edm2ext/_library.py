"""Finds and loads the native libraries: libedm2_ops.so (the ops) and _C (build facts, optional)."""

import ctypes
import functools
import sys
from pathlib import Path
from types import ModuleType

import torch

LIBRARY_NAME = "libedm2_ops.so"
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


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


@functools.cache
def has_kernel(op: str, device: str) -> bool:
    """Whether the native op has a kernel for a device type ("cpu" or "cuda") that can be used in this process."""
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


def build_info() -> dict[str, object]:
    """What was built and loaded, and why.

    Keys: `native` (is the library loaded), `reason` (why not, else empty), `library` (its path), `torch` (version
    running), `cpu_isa` (instruction set of the CPU kernels in use), `cuda` (can the CUDA kernels be used),
    `cuda_reason` (why not, else empty), `cuda_compiled`, `cuda_toolkit`, `cuda_driver`, `cuda_archs`, and `build`: the
    facts recorded when the library was built, or why they cannot be read.
    """
    build = _C.build_info() if _C else None
    return {
        "native": LOADED,
        "reason": REASON,
        "library": str(PATH) if PATH else None,
        "torch": torch.__version__,
        "cpu_isa": _cpu_isa(),
        "cuda": not cuda_obstacle(),
        "cuda_reason": cuda_obstacle(),
        "cuda_compiled": _toolkit_version() is not None,
        "cuda_toolkit": _dotted(_toolkit_version()),
        "cuda_driver": _dotted(_driver_version()),
        "cuda_archs": build["cuda_archs"] if build else None,
        "build": build if build else f"edm2ext._C: {_C_REASON}",
    }
