"""Tensors in a file of the reference, of old and new torch: they stay there until they are asked for (spec 9.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from python_train.pickles.files import reading
from python_train.safe_pickle import Blob, Names, Refused, StandIn, load

MAX_DIMS = 8


@dataclass(frozen=True)
class Storage:
    """Numbers that lie one after another in a file."""

    path: Path
    dtype: torch.dtype
    start: int
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: known shape and dtype, its numbers still there."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self) -> Tensor:
        """The numbers as a contiguous CPU tensor of the stored dtype. UserError if the file has changed meanwhile."""
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        itemsize = self.dtype.itemsize
        with reading(self.storage.path) as file:
            content = file.read_at(self.storage.start + self.offset * itemsize, (last + 1) * itemsize)
        flat = torch.frombuffer(bytearray(content), dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


def integers(values: Any) -> tuple[int, ...]:
    if (
        not isinstance(values, tuple)
        or len(values) > MAX_DIMS
        or not all(type(value) is int and abs(value) < 2**60 for value in values)
    ):
        raise Refused("the shape or the strides of a tensor in it are not a few integers")
    return values


def rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v2``: checked against the storage, and no larger than it (spec 9.3, 9.5)."""
    shape, stride = integers(shape), integers(stride)
    if not isinstance(storage, Storage) or type(offset) is not int or len(shape) != len(stride):
        raise Refused("a tensor in it has no storage, no offset, or not one stride for each dimension")
    if offset < 0 or min(shape, default=0) < 0 or min(stride, default=0) < 0:
        raise Refused("a tensor in it has a negative offset, size or stride")
    tensor = StoredTensor(storage, offset, shape, stride)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if tensor.numel and (last >= storage.count or tensor.numel > storage.count):
        raise Refused(f"a tensor of shape {list(shape)} in it reaches outside of its {storage.count} stored numbers")
    return tensor


def rebuild_parameter(tensor: Any, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise Refused("a parameter in it is not made of a tensor")
    return tensor


STORAGE_TYPES: Names = {
    ("torch", f"{name}Storage"): StandIn(value=dtype)
    for name, dtype in {
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Float": torch.float32,
        "Double": torch.float64,
        "Long": torch.int64,
        "Int": torch.int32,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


def storage_id(value: Any) -> tuple[torch.dtype, str, int]:
    """(dtype, key, element count) of a persistent id ('storage', type, key, location, count[, view])."""
    if (
        not isinstance(value, tuple)
        or len(value) not in (5, 6)
        or value[0] != "storage"
        or value[5:] not in ((), (None,))
    ):
        raise Refused("it refers to an object outside of the file that is not a storage")
    kind, key, count = value[1], value[2], value[4]
    if not isinstance(kind, StandIn) or not isinstance(kind.value, torch.dtype):
        raise Refused("a storage in it has no type")
    if not isinstance(key, str) or type(count) is not int or count < 0:
        raise Refused("a storage in it has no name or no size")
    return kind.value, key, count


def storage_of_blob(blob: Any) -> Storage:
    """``torch.storage._load_from_bytes``: one storage in the form that torch had before its zip files (spec 9.3)."""
    if not isinstance(blob, Blob):
        raise Refused("a storage in it is not made of bytes")
    reader = blob.reader()
    if load(reader, {}) != 0x1950A86A20F9469CFC6C or load(reader, {}) != 1001:
        raise Refused("a storage in it does not begin like one of torch")
    system = load(reader, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("a storage in it is not little-endian")
    found = load(reader, STORAGE_TYPES, storage_id)
    keys = load(reader, {})
    if (
        not isinstance(found, tuple)
        or len(found) != 3
        or not isinstance(found[0], torch.dtype)
        or not _is_one(keys, found[1])
    ):
        raise Refused("a storage in it is not exactly one")
    dtype, _, count = found
    if reader.number("<q") != count or count * dtype.itemsize != reader.remaining:
        raise Refused(f"a storage in it claims {count} numbers of {dtype} and has {reader.remaining} bytes")
    return Storage(Path(blob.file.path), dtype, reader.position, count)


def _is_one(keys: Any, key: str) -> bool:
    return isinstance(keys, list) and len(keys) == 1 and isinstance(keys[0], str) and keys[0] == key
