"""Launches and memory traffic of a computation, counted on meta tensors: without a GPU and without memory for the data.

Meta tensors take the path that CUDA tensors would take. An op of edm2ext runs its CUDA binding and launcher up to the
launch itself, which counts what each kernel must move. An op of plain torch counts as one launch that reads its inputs
and writes its outputs: every element of their storage once, so that an expanded tensor counts once and a view nothing.
Products (convolutions, matrix products, attention) are kept apart.
"""

import contextlib
import ctypes
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from edm2ext import _library, reference

aten = torch.ops.aten
PHASES = ("forward", "backward", "update")  # update: all that follows the backward pass
KINDS = ("product", "native", "plain")
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_flash_attention")
# Allocations, and views that their schema does not call views.
_FREE = ("empty", "new_empty", "lift_fresh", "_unsafe_view", "_reshape_alias", "is_same_size", "_fused_sdp_choice")
# Of an image [N, O, H, W] for an image [N, C, H, W] by a filter [O, C, h, w].
_FLOPS = {
    "mp_conv2d": lambda x, w, *_: 2 * w.numel() * x[:, 0].numel(),
    "mp_conv2d_silu_modulated": lambda x, w, *_: 2 * w.numel() * x[:, 0].numel(),
    "mp_conv2d_sum": lambda x, w, *_: 2 * w.numel() * x[:, 0].numel(),
    "mp_conv2d_qkv_norm": lambda x, w, *_: 2 * w.numel() * x[:, 0].numel(),
    "mp_cat_conv2d": lambda a, b, w, *_: 2 * w.numel() * a[:, 0].numel(),
    "mp_cat_conv2d_backward_weight": lambda grad, a, b, *_: 2 * grad.numel() * (a.shape[1] + b.shape[1]),
    "mp_conv2d_backward_input": lambda grad, w, *_: 2 * w.numel() * grad[:, 0].numel(),
    "mp_conv2d_backward_weight": lambda grad, x, h, w, *_: 2 * grad.numel() * x.shape[1] * h * w,
}
# These write their first argument without reading it.
_OVERWRITING = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "_foreach_copy_", "_foreach_zero_")


@dataclasses.dataclass
class Traffic:
    """Launches, and bytes that they move; `workspace`: bytes that native ops allocate for themselves."""

    launches: int = 0
    read: int = 0
    written: int = 0
    workspace: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Key(NamedTuple):
    """What the counts are kept by: one of PHASES, one of KINDS, name of the op."""

    phase: str
    kind: str
    op: str


class Counter(TorchDispatchMode):
    """Counts, by `Key`, what ops on meta tensors would launch and move on a GPU; ops on CPU tensors are not counted.

    `synchronisations` is the number of times the host asked for a value. It is told 1 or True. `flops` are those of
    products, 2 a multiply-add.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[Key, Traffic] = {}
        self.synchronisations = 0
        self.flops = 0
        self._after_backward = False
        self._native_op: str | None = None

    def total(self, **wanted: str) -> Traffic:
        """The sum over all rows whose key has the given `phase`, `kind` or `op`."""
        chosen = (row for key, row in self.rows.items() if all(getattr(key, k) == v for k, v in wanted.items()))
        return sum(chosen, Traffic())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _meta_tensors((args, kwargs))
        if func is aten._local_scalar_dense.default and inputs:
            self.synchronisations += 1
            return torch.ones((), dtype=inputs[0].dtype).item()
        if func.namespace == "edm2" and inputs:
            return self._native(func, args, kwargs)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            with self:  # an op that consists of others: seldom met here, but bindings call some
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = _as_on_cuda(func, args, func(*args, **kwargs))
        if inputs and (formula := flop_registry.get(func.overloadpacket)):
            self.flops += formula(*args, **kwargs, out_val=result)
        outputs = _meta_tensors(result)
        if (inputs or outputs) and not _is_free(func):
            self._count(func._opname, _plain_traffic(func, args, kwargs, outputs))
        return result

    def _native(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the op's CUDA binding. What that calls of torch, such as a copy to another layout, counts as plain."""
        take_tally()
        self._native_op = func._opname
        try:
            with self:
                result = func.redispatch(_CUDA, *args, **kwargs)
        finally:
            self._native_op = None
        if formula := _FLOPS.get(func._opname):
            self.flops += formula(*args)
        self._count(func._opname, take_tally(), kind="product" if "conv2d" in func._opname else "native")
        return result

    def _count(self, op: str, traffic: Traffic, kind: str = "") -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        self._after_backward |= in_backward
        phase = "backward" if in_backward else "update" if self._after_backward else "forward"
        kind = kind or ("product" if op.startswith(_PRODUCTS) else "plain")
        if self._native_op is not None:
            op = f"{op} in {self._native_op}"
        key = Key(phase, kind, op)
        self.rows[key] = self.rows.get(key, Traffic()) + traffic


class PeakMemory(TorchDispatchMode):
    """The most memory, in bytes, that results of ops on meta tensors occupied at a time: what was there before, and the
    workspaces of native ops, do not count. Entered last among several modes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._most_alive = 0  # as if nothing had been freed since the last look
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in _meta_tensors((args, kwargs))}
        for x in _meta_tensors(results):
            storage = x.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self._alive:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self._most_alive += storage.nbytes()
        if self._most_alive > self.bytes:
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self._most_alive = sum(size for _, size in self._alive.values())
            self.bytes = max(self.bytes, self._most_alive)
        return results


def take_tally() -> Traffic:
    """What native ops on meta tensors would have launched since the last call."""
    numbers = (ctypes.c_int64 * 4)()
    ctypes.CDLL(str(_library.PATH)).edm2_take_tally(numbers)
    return Traffic(*numbers)


def storage_bytes(x: Tensor) -> int:
    """Bytes of the elements that x shows, each counted once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size)
    return x.element_size() * math.prod(sizes)


def _meta_tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta]


def _is_free(func: Any) -> bool:
    """Views and allocations."""
    returned = [value.alias_info for value in func._schema.returns]
    is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return is_view or func._opname.startswith(_FREE)


def _plain_traffic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> Traffic:
    """Inputs and outputs of an op; what it writes in place is both, unless the op only overwrites it."""
    read: list[Tensor] = []
    written = list(outputs)
    returns_writes = any(value.alias_info is not None for value in func._schema.returns)
    for argument, value in zip(func._schema.arguments, args, strict=False):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if not (writes and func._opname.startswith(_OVERWRITING)):
            read += _meta_tensors(value)
        if writes and not returns_writes:
            written += _meta_tensors(value)
    for argument in func._schema.arguments:
        if argument.name in kwargs and not argument.is_out:
            read += _meta_tensors(kwargs[argument.name])
    return Traffic(1, sum(map(storage_bytes, read)), sum(map(storage_bytes, written)))


def _as_on_cuda(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """The result in the layout that CUDA would give it, where meta tensors get another."""
    if func is aten.convolution.default:
        formats = {reference.memory_format(x) for x in args[:2]} - {torch.contiguous_format}
        return torch.empty_like(result, memory_format=formats.pop()) if formats else result
    return result


class CudaLayouts(TorchDispatchMode):
    """Meta tensors get the layouts within that they would have on CUDA."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _as_on_cuda(func, args, func(*args, **(kwargs or {})))


class _FlashAttention(TorchFunctionMode):
    """Attention on meta tensors takes the kernel that it takes on CUDA, not that of a CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
            return aten._scaled_dot_product_flash_attention(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Counts what runs within."""
    with _FlashAttention(), Counter() as counter:
        yield counter
