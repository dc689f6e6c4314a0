"""Which implementation serves a call: the native kernels or the plain-torch reference."""

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from edm2ext import _library, reference

Backend = Literal["auto", "native", "reference"]
_BACKENDS = ("auto", "native", "reference")
_backend: Backend = "auto"

# fp16 on the CPU is left to the reference: the CPU kernels have no fp16 arithmetic. On CUDA fp64 is.
_CPU_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})
_CUDA_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

_Function = TypeVar("_Function", bound=Callable[..., Any])


class set_backend:
    """Choose the backend for the whole process: "auto" (the default), "native" or "reference".

    "auto" serves each call by a native kernel where there is one for its device and dtype, and by the reference
    elsewhere. "native" does the same, but raises RuntimeError here and now if the native library is missing. Takes
    effect at once; used in a `with` statement, the previous choice returns at the end of the block. Raises ValueError
    for any other name.
    """

    def __init__(self, backend: Backend) -> None:
        global _backend
        if backend not in _BACKENDS:
            raise ValueError(f"set_backend: backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
        if backend == "native" and not _library.LOADED:
            raise RuntimeError(f"set_backend: the native library is not available: {_library.REASON}")
        self._previous = _backend
        _backend = backend

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _backend
        _backend = self._previous


def get_backend() -> Backend:
    """The backend chosen by `set_backend`."""
    return _backend


_registrations = torch.library.Library("edm2", "FRAGMENT")


@functools.cache
def op(name: str) -> Callable[..., Any] | None:
    """The native op `edm2::name`, or None without a native library. ImportError if the library is older than this file.

    Autograd is the business of the functions around the op: the dispatcher's own handling is skipped (0.5 us a call).
    """
    if not _library.LOADED:
        return None
    try:
        found = getattr(torch.ops.edm2, name).default
    except AttributeError:
        built = f"{_library.PATH} has no {name}: it was built from another version of edm2ext"
        raise ImportError(f"{built}; build it again (make setup, or pip install)") from None
    _registrations.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return found


def fake(name: str) -> Callable[[_Function], _Function]:
    """Decorator: the function computes the metadata (shape, strides, dtype) of the native op's outputs."""

    def register(function: _Function) -> _Function:
        return torch.library.register_fake(f"edm2::{name}", function) if _library.LOADED else function

    return register


class Kernels(NamedTuple):
    """The devices for which all native ops of a function have kernels.

    `cuda`: that can be used in this process. `meta`: CUDA kernels in the library, usable or not: meta tensors take the
    path that a CUDA tensor would take where they are.
    """

    cpu: bool
    cuda: bool
    meta: bool


def kernels(*names: str) -> Kernels:
    """Where the named native ops can all run."""
    return Kernels(*(all(_library.has_kernel(name, device) for name in names) for device in Kernels._fields))


def native(x: Tensor, where: Kernels) -> bool:
    """Whether native kernels serve a call on x, given where they exist: not on a GPU for which none were compiled.

    Forward-mode AD and functorch transforms need formulas that torch can look into: outside of torch.compile, which
    differentiates by itself, they take the reference.
    """
    if _backend == "reference":
        return False
    if x.is_cpu:
        served = where.cpu
    elif x.is_cuda:
        served = where.cuda and _library.runs_on_gpu(x.get_device())
    else:
        served = where.meta and x.is_meta
    return served and x.dtype in dtypes(x) and not transforming()


def dtypes(x: Tensor) -> frozenset[torch.dtype]:
    """The dtypes that native kernels know on x's device."""
    return _CPU_DTYPES if x.is_cpu else _CUDA_DTYPES


def transforming() -> bool:
    """Whether a forward-mode level or a functorch transform is active in eager mode."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is done to any of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def differentiating_backward() -> bool:
    """Whether a backward pass must itself be differentiable: it then takes the reference formula."""
    return (
        torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    ) and not torch.compiler.is_compiling()


def reference_vjp(
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    needs_grad: tuple[bool, ...],
    grads: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """The vector-Jacobian product of function at inputs, as a differentiable function of inputs and grads."""
    wanted = [x for x, needed in zip(inputs, needs_grad, strict=True) if needed]
    if not wanted:
        return (None,) * len(inputs)
    with torch.enable_grad():
        outputs = function(*inputs)
    create_graph = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if needed else None for needed in needs_grad)


def empty_output(x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """What a native op allocates for its output: in x's memory format, and in its shape and dtype unless given."""
    return torch.empty(
        x.shape if shape is None else shape,
        dtype=x.dtype if dtype is None else dtype,
        device=x.device,
        memory_format=reference.memory_format(x),
    )


def is_dense(x: Tensor) -> bool:
    """Whether x fills its memory without gaps, in one of the two layouts that the native ops write in place."""
    return x.is_contiguous() or reference.memory_format(x) != torch.contiguous_format


def by_dtype_and_device(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups of one dtype and device each, as one native call takes them."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())
