"""Weights of the EDM2 reference program, read without executing anything (spec 9): snapshots and training states.

The reference stores pickles that carry source code and run it when they are loaded. :mod:`python_train.safe_pickle`
reads them as data; this module knows what the data mean. Tensors stay in the file until they are asked for.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from python_train import UserError
from python_train.data import VAE_MEAN, VAE_STD, LatentEncoder
from python_train.network import Block, Precond, UNet
from python_train.safe_pickle import Blob, Buildable, Names, Reader, Refused, SourceFile, StandIn, load

LICENSE = "CC BY-NC-SA 4.0"
FILE_NAME = re.compile(r"(.*)-(\d+)-(\d+\.\d+)\.pkl")
TRACKED_SIGMA_RELS = (0.05, 0.10)
# Far above what the largest network has: a file cannot make the walk through it long.
_MAX_MODULES, _MAX_MEMBERS, _MAX_TENSORS, _MAX_DEPTH, _MAX_AVERAGES, _MAX_DIMS = 4096, 512, 4096, 8, 16, 8
_LIST_ARGUMENTS = ("channel_mult", "attn_resolutions", "resample_filter")


# ------------------------------------------------------------------------------------------------------------- tensors


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
        with _reading(self.storage.path) as file:
            content = file.read_at(self.storage.start + self.offset * itemsize, (last + 1) * itemsize)
        flat = torch.frombuffer(bytearray(content), dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


def _integers(values: Any) -> tuple[int, ...]:
    if (
        not isinstance(values, tuple)
        or len(values) > _MAX_DIMS
        or not all(type(value) is int and abs(value) < 2**60 for value in values)
    ):
        raise Refused("the shape or the strides of a tensor in it are not a few integers")
    return values


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v2``: checked against the storage, and no larger than it (spec 9.3, 9.5)."""
    shape, stride = _integers(shape), _integers(stride)
    if not isinstance(storage, Storage) or type(offset) is not int or len(shape) != len(stride):
        raise Refused("a tensor in it has no storage, no offset, or not one stride for each dimension")
    if offset < 0 or min(shape, default=0) < 0 or min(stride, default=0) < 0:
        raise Refused("a tensor in it has a negative offset, size or stride")
    tensor = StoredTensor(storage, offset, shape, stride)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if tensor.numel and (last >= storage.count or tensor.numel > storage.count):
        raise Refused(f"a tensor of shape {list(shape)} in it reaches outside of its {storage.count} stored numbers")
    return tensor


def _rebuild_parameter(tensor: Any, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise Refused("a parameter in it is not made of a tensor")
    return tensor


_STORAGE_TYPES: Names = {
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


def _storage_id(value: Any) -> tuple[torch.dtype, str, int]:
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


def _storage_of_blob(blob: Any) -> Storage:
    """``torch.storage._load_from_bytes``: one storage in the form that torch had before its zip files (spec 9.3)."""
    if not isinstance(blob, Blob):
        raise Refused("a storage in it is not made of bytes")
    reader = blob.reader()
    if load(reader, {}) != 0x1950A86A20F9469CFC6C or load(reader, {}) != 1001:
        raise Refused("a storage in it does not begin like one of torch")
    system = load(reader, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("a storage in it is not little-endian")
    found = load(reader, _STORAGE_TYPES, _storage_id)
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


# --------------------------------------------------------------------------------------------------------------- NumPy


class _NumpyType(Buildable):
    """``numpy.dtype(...)``: numbers of the usual sizes, little-endian."""

    def __init__(self, name: Any, *_: Any) -> None:
        if not isinstance(name, str) or re.fullmatch(r"[fiu][1248]|b1", name) is None or name == "f1":
            raise Refused("an array in it is not of plain numbers")
        self.dtype = np.dtype(f"<{name}")

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 8 or state[1] not in ("<", "|", "="):
            raise Refused("an array in it is not little-endian")
        if any(part is not None for part in state[2:5]):
            raise Refused("an array in it has sub-types")


class _NumpyArray(Buildable):
    """``numpy._core.multiarray._reconstruct(...)`` and the state it gets."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _NumpyType):
            raise Refused("an array in it has no shape and type")
        shape, dtype, fortran, content = _integers(state[1]), state[2].dtype, state[3], state[4]
        if min(shape, default=1) < 1 or math.prod(shape) * dtype.itemsize != _length(content):
            raise Refused(f"an array of shape {list(shape)} in it does not have {dtype} numbers for it")
        flat = np.frombuffer(_bytes(content), dtype)
        self.value = flat.reshape(shape, order="F" if fortran is True else "C")


def _numpy_scalar(kind: Any, content: Any) -> float | int | bool:
    if not isinstance(kind, _NumpyType) or _length(content) != kind.dtype.itemsize:
        raise Refused("a NumPy number in it has no type or no value")
    return np.frombuffer(_bytes(content), kind.dtype)[0].item()


def _length(content: Any) -> int:
    return content.length if isinstance(content, Blob) else len(content) if isinstance(content, bytes) else -1


def _bytes(content: Any) -> bytes:
    return content.read() if isinstance(content, Blob) else content


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """``_codecs.encode``: how pickles before protocol 3 write bytes."""
    if not isinstance(text, str) or len(text) > 1024 or encoding != "latin1":
        raise Refused("bytes in it are not written as a short latin1 text")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise Refused("bytes in it are not written as latin1 text") from error


# ------------------------------------------------------------------------------------------------------------- objects


class Module(Buildable):
    """An object of the reference or of torch.nn: the name of its class and its attributes."""

    def __init__(self, class_name: str, state: dict[str, Any] | None = None) -> None:
        self.class_name = class_name
        self.state = state or {}

    def build(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Refused(f"the state of a {self.class_name} in it is not a dictionary")
        self.state = state


def _rebuild_persistent(meta: Any) -> Module:
    """``torch_utils.persistence._reconstruct_persistent_obj``: the source that comes along is dropped unread (9.2)."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or meta.get("version") != 6:
        raise Refused("an object in it is not stored in the one way that these files use (class, version 6)")
    class_name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(class_name, str) or re.fullmatch(r"\w{1,64}", class_name) is None or not isinstance(state, dict):
        raise Refused("an object in it has no class name or no state")
    return Module(class_name, state)


def _dictionary() -> dict[Any, Any]:
    return {}


_NUMPY: Names = {
    **{
        (module, name): stand_in
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2
        for name, stand_in in {
            "_reconstruct": StandIn(call=_NumpyArray, counts=(3,)),
            "scalar": StandIn(call=_numpy_scalar, counts=(2,)),
        }.items()
    },
    ("numpy", "ndarray"): StandIn(),
    ("numpy", "dtype"): StandIn(call=_NumpyType, counts=(1, 3)),
    ("_codecs", "encode"): StandIn(call=_encode, counts=(1, 2)),
}
_PLAIN: Names = {
    ("dnnlib.util", "EasyDict"): StandIn(call=_dictionary, counts=(0,), new=_dictionary),
    ("collections", "OrderedDict"): StandIn(call=_dictionary, counts=(0,), new=_dictionary),
    ("torch._utils", "_rebuild_tensor_v2"): StandIn(call=_rebuild_tensor, counts=(6, 7)),
    ("torch._utils", "_rebuild_parameter"): StandIn(call=_rebuild_parameter, counts=(3,)),
    **_NUMPY,
}
_SNAPSHOT: Names = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): StandIn(call=_rebuild_persistent, counts=(1,)),
    ("torch.nn.modules.container", "ModuleDict"): StandIn(new=lambda: Module("ModuleDict")),
    ("torch.storage", "_load_from_bytes"): StandIn(call=_storage_of_blob, counts=(1,)),
    **_PLAIN,
}
_TRAINING_STATE: Names = {**_PLAIN, **_STORAGE_TYPES}


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[SourceFile]:
    """Open a file, and let every refusal name it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        with SourceFile(path) as file:
            yield file
    except Refused as error:
        raise UserError(f"{path} is refused: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error


def _read_pickle(file: SourceFile, names: Names) -> Any:
    reader = Reader(file, 0, file.size)
    content = load(reader, names)
    if reader.remaining:
        raise Refused(f"{reader.remaining} bytes follow the end of its pickle")
    return content


_MEMBER = re.compile(r"/(data\.pkl|data/[^/]+|byteorder)$")


def _read_zip(file: SourceFile, names: Names = _TRAINING_STATE) -> Any:
    """The object in a zip file of torch: ``data.pkl`` and a member for each storage, none of them compressed. Other
    members, such as the code of a script, are not looked at."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = {info.filename: info for info in archive.infolist() if _MEMBER.search(info.filename)}
            if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in members.values()):
                raise Refused("it has compressed or encrypted members")
            if sum(info.file_size for info in members.values()) > file.size:
                raise Refused("its members claim more bytes than it has")
            for info in members.values():
                _check_sum(archive, info)
    except Refused:
        raise
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, OSError, struct.error) as error:
        raise Refused(f"it is not a zip file of torch, or damaged ({error})") from error
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused("it is not a zip file of torch: there is not one data.pkl in it")
    root = roots[0]
    if (order := members.get(f"{root}byteorder")) is not None and file.read_at(*_extent(file, order)) != b"little":
        raise Refused("its numbers are not little-endian")

    def storage(value: Any) -> Storage:
        dtype, key, count = _storage_id(value)
        info = members.get(f"{root}data/{key}")
        if info is None or info.file_size != count * dtype.itemsize:
            raise Refused(f"a storage in it claims {count} numbers of {dtype}, which are not there")
        return Storage(Path(file.path), dtype, _extent(file, info)[0], count)

    start, size = _extent(file, members[f"{root}data.pkl"])
    return load(Reader(file, start, start + size), names, storage)


def _check_sum(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Refused unless a member is there as its checksum says."""
    try:
        with archive.open(info) as content:
            while content.read(2**20):
                pass
    except zipfile.BadZipFile as error:
        raise Refused(f"{info.filename[:80]!r} in it does not match its checksum") from error


def _extent(file: SourceFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of an uncompressed member lie: (start, size)."""
    header = file.read_at(info.header_offset, 30)
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if header[:4] != b"PK\3\4" or start + info.file_size > file.size:
        raise Refused("a member of it does not lie in it")
    return start, info.file_size


# ----------------------------------------------------------------------------------------------------------- snapshots


@dataclass(frozen=True)
class OfficialSnapshot:
    """One network of the reference: the header that our snapshots have, and its tensors in state-dict order.

    ``header["nimg"]`` and ``header["sigma_rel"]`` are None where the file's name does not tell them (spec 5.4).
    """

    header: dict[str, Any]
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class OfficialTrainingState:
    """A training state of the reference: its averages by width sigma_rel (a traditional one has width None)."""

    nimg: int
    averages: dict[float | None, OfficialSnapshot]


def is_official(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name says that it is a pickle of the reference."""
    return Path(path).suffix == ".pkl"


def read_snapshot(path: str | os.PathLike[str]) -> OfficialSnapshot:
    """Read a snapshot or a reconstructed network of the reference, executing nothing; the weights stay in the file.

    The network's configuration is checked against its blocks and tensors, so ``Precond(**header["config"])`` takes the
    tensors as its state dict. Raises UserError, naming the file and the reason, for anything else than such a file.
    """
    path = Path(path)
    with _reading(path) as file:
        content = _read_pickle(file, _SNAPSHOT)
        net = content.get("ema") if isinstance(content, dict) else None
        if not isinstance(net, Module) or net.class_name != "Precond":
            raise Refused("it holds no EDM2 network under 'ema'")
        modules = _modules(net)
        tensors = _tensors(modules)
        config = _checked_config(_config(net), tensors, modules, file.size)
        header = {
            "format_version": 1,
            "config": config,
            **name_facts(path),
            "dataset": _dataset(content.get("dataset_kwargs"), config),
            "encoder": _encoder(content.get("encoder")),
            "license": LICENSE,
            "source": {"file": path.name, "bytes": file.size},
        }
    return OfficialSnapshot(header, tensors)


def name_facts(path: Path) -> dict[str, Any]:
    """What a file's name tells (spec 5.4): nimg, sigma_rel (None where it does not) and ema_kind.

    A reconstructed network is named like a tracked one. One with a tracked width is the tracked average, so only other
    widths count as reconstructed.
    """
    match = FILE_NAME.fullmatch(path.name)
    if match is None:
        return {"nimg": None, "sigma_rel": None, "ema_kind": "phema"}
    prefix, kimg, sigma_rel = match[1], int(match[2]), float(match[3])
    tracked = prefix != "phema" and (prefix == "network-snapshot" or sigma_rel in TRACKED_SIGMA_RELS)
    return {"nimg": nimg_of(kimg), "sigma_rel": sigma_rel, "ema_kind": "power" if tracked else "phema"}


def nimg_of(kimg: int) -> int:
    """Images seen at a snapshot that is named by thousands: a multiple of 1024 (spec 5.4)."""
    nimg = (kimg * 1000 + 999) // 1024 * 1024
    return nimg if nimg // 1000 == kimg else kimg * 1000


def _modules(module: Module) -> dict[str, Module]:
    """All modules by name, each before its sub-modules."""
    found: dict[str, Module] = {}
    visited: set[int] = set()

    def visit(name: str, module: Module) -> None:
        if id(module) in visited or name.count(".") > _MAX_DEPTH or len(found) >= _MAX_MODULES:
            raise Refused("its modules contain each other, one is used twice, or there are too many")
        visited.add(id(module))
        found[name] = module
        for child_name, child in _members(module, "_modules"):
            if not isinstance(child, Module):
                raise Refused(f"{name}.{child_name} in it is not a module")
            visit(f"{name}.{child_name}".removeprefix("."), child)

    visit("", module)
    return found


def _tensors(modules: dict[str, Module]) -> dict[str, StoredTensor]:
    """The state dict: of each module its parameters, then its buffers (spec 9.5)."""
    tensors: dict[str, StoredTensor] = {}
    for prefix, module in modules.items():
        unsaved = module.state.get("_non_persistent_buffers_set")
        unsaved = unsaved if isinstance(unsaved, set) else set()
        for kind, left_out in (("_parameters", set()), ("_buffers", unsaved)):
            for name, value in _members(module, kind):
                full = f"{prefix}.{name}".removeprefix(".")
                if not isinstance(value, StoredTensor) or len(tensors) >= _MAX_TENSORS:
                    raise Refused(f"{full} in it is not a tensor, or there are too many")
                if name not in left_out:
                    tensors[full] = value
    return tensors


def _members(module: Module, kind: str) -> list[tuple[str, Any]]:
    members = module.state.get(kind, {})
    if not isinstance(members, dict) or len(members) > _MAX_MEMBERS:
        raise Refused(f"{kind} of a {module.class_name} in it is not a dictionary, or too large")
    if not all(isinstance(name, str) and re.fullmatch(r"\w{1,64}", name, re.ASCII) for name in members):
        raise Refused(f"a name in {kind} of a {module.class_name} is not one")
    return [(name, value) for name, value in members.items() if value is not None]


def _config(net: Module) -> dict[str, Any]:
    """Constructor arguments of the network: what the reference was told, the rest being its defaults (spec 3.2-3.4)."""
    args, kwargs = net.state.get("_init_args", ()), net.state.get("_init_kwargs")
    if args != () or not isinstance(kwargs, dict):
        raise Refused("its network does not say how it was made (by keywords)")
    config = {"use_fp16": True, "sigma_data": 0.5, "logvar_channels": 128, **kwargs}
    for key, value in config.items():
        numbers = value if key in _LIST_ARGUMENTS and isinstance(value, (list, tuple)) else [value]
        if not isinstance(key, str) or not all(_is_number(number) for number in numbers) or len(numbers) > _MAX_DIMS:
            raise Refused(f"the network's argument {str(key)[:40]!r} in it is not a number or a short list of numbers")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float, bool) and abs(value) < 2**31)


def _checked_config(
    config: dict[str, Any], tensors: dict[str, StoredTensor], modules: dict[str, Module], file_size: int
) -> dict[str, Any]:
    """The configuration in full; Refused unless it describes exactly these tensors, and the blocks where they tell."""
    if sum(tensor.nbytes for tensor in tensors.values()) > file_size:
        raise Refused("its tensors are the same numbers several times")
    num_blocks, levels = config.get("num_blocks", 3), config.get("channel_mult", [1, 2, 3, 4])
    # Before it is built: at least four tensors of a block, in the encoder and in the decoder.
    least = 8 * num_blocks * len(levels) if type(num_blocks) is int and isinstance(levels, list) else math.inf
    if not least <= len(tensors) <= _MAX_TENSORS:
        raise Refused(f"its network should have {num_blocks} blocks at each level and has {len(tensors)} tensors")
    try:
        with torch.device("meta"):
            net = Precond(**config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise Refused(f"its network cannot be made from its arguments ({reason})") from error
    expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors or tensors[name].shape != expected[name]:
            raise Refused(
                f"the tensor {name[:80]!r} is missing, unknown or of a wrong shape for its network's arguments"
            )
        if not tensors[name].dtype.is_floating_point:
            raise Refused(f"the tensor {name} in it has {tensors[name].dtype} numbers")
    ours = dict(net.named_modules())
    for name, stored in modules.items():
        module = ours.get(name)
        for key in _STORED_FACTS.get(type(module), ()):
            _check_fact(name, key, getattr(module, key), stored.state)
    return net.config


_STORED_FACTS: dict[type, tuple[str, ...]] = {
    Precond: ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data"),
    UNet: ("label_balance", "concat_balance"),
    Block: (
        "flavor",
        "resample_mode",
        "resample_filter",
        "num_heads",
        "dropout",
        "res_balance",
        "attn_balance",
        "clip_act",
    ),
}


def _check_fact(name: str, key: str, ours: Any, state: dict[str, Any]) -> None:
    """Where a stored module tells what it does, it must be what ours does."""
    theirs = state.get(key, ours)
    theirs = tuple(theirs) if isinstance(theirs, list) else theirs
    same_kind = type(theirs) is type(ours) or {type(theirs), type(ours)} <= {int, float}
    flat = not isinstance(theirs, tuple) or all(type(value) in (int, float) for value in theirs)
    if not same_kind or not flat or theirs != ours:
        shown = theirs if type(theirs) in (int, float, bool, str, type(None)) else type(theirs).__name__
        raise Refused(f"{name or 'its network'} was made with {key} {str(shown)[:40]}, not with {ours}")


def _dataset(kwargs: Any, config: dict[str, Any]) -> dict[str, Any]:
    """What our headers say of the data set, as far as the reference does."""
    path = kwargs.get("path") if isinstance(kwargs, dict) else None
    path = path if isinstance(path, str) else ""
    return {
        "name": re.split(r"[/\\]", path)[-1].rpartition(".")[0] or path,
        "path": path,
        "resolution": config["img_resolution"],
        "label_dim": config["label_dim"],
    }


def _encoder(encoder: Any) -> dict[str, Any]:
    """Our description of the stored encoder (spec 1.1, 1.2, 9.1)."""
    class_name = encoder.class_name if isinstance(encoder, Module) else None
    if class_name == "StandardRGBEncoder":
        return {"kind": "pixel"}
    if class_name != "StabilityVAEEncoder":
        raise Refused("its encoder is neither StandardRGBEncoder nor StabilityVAEEncoder")
    scale, bias = (_vector(encoder.state.get(key)) for key in ("scale", "bias"))
    if len(scale) != len(bias) or not (scale > 0).all() or not np.isfinite([scale, bias]).all():
        raise Refused("its encoder has no scale and bias for each channel")
    published = np.float32(0.5) / np.float32(VAE_STD)
    if np.array_equal(scale, published) and np.array_equal(bias, np.float32(0) - np.float32(VAE_MEAN) * published):
        return LatentEncoder().facts()
    std = 0.5 / scale.astype(np.float64)
    return LatentEncoder(tuple((-bias * 2 * std).tolist()), tuple(std.tolist())).facts()


def _vector(array: Any) -> np.ndarray:
    if not isinstance(array, _NumpyArray) or array.value is None or array.value.ndim != 1:
        raise Refused("its encoder has no scale and bias for each channel")
    return array.value.astype(np.float32)


# ----------------------------------------------------------------------------------------------------- training states


def read_training_state(path: str | os.PathLike[str]) -> OfficialTrainingState:
    """Read the averages of a training state (``.pt``) of the reference, executing nothing; weights stay in the file.

    The file does not say how its network was made: the configuration is inferred from names and shapes, with attention
    heads of 64 channels and no dropout (which only matters for training). Raises UserError as
    :func:`read_snapshot` does.
    """
    path = Path(path)
    with _reading(path) as file:
        content = _read_zip(file)
        counters = content.get("state") if isinstance(content, dict) else None
        nimg = counters.get("cur_nimg") if isinstance(counters, dict) else None
        if type(nimg) is not int or nimg < 0:
            raise Refused("it is no training state of the EDM2 reference program: it has no state.cur_nimg")
        averages: dict[float | None, OfficialSnapshot] = {}
        config: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for sigma_rel, state in _averages(content.get("ema")):
            if not all(isinstance(name, str) and isinstance(value, StoredTensor) for name, value in state.items()):
                raise Refused("an average in it is not a dictionary of tensors")
            if not averages:
                config = _checked_config(_inferred_config(state), state, {}, file.size)
                shapes = {name: tensor.shape for name, tensor in state.items()}
            elif {name: tensor.shape for name, tensor in state.items()} != shapes:
                raise Refused("its averages are not of one network")
            channels = config["img_channels"]
            header = {
                "format_version": 1,
                "config": config,
                "nimg": nimg,
                "sigma_rel": sigma_rel,
                "ema_kind": "power",
                "dataset": _dataset(None, config),
                "encoder": LatentEncoder().facts() if channels == len(VAE_MEAN) else {"kind": "pixel"},
                "license": LICENSE,
                "source": {"file": path.name, "bytes": file.size},
            }
            averages[sigma_rel] = OfficialSnapshot(header, state)
    return OfficialTrainingState(nimg, averages)


def _averages(ema: Any) -> list[tuple[float | None, dict[Any, Any]]]:
    """(width, state dict) of each average: power-function ones, or one traditional (spec 5.2, 9.6)."""
    if not isinstance(ema, dict):
        raise Refused("it holds no average of its network")
    if "emas" not in ema:
        return [(None, ema)]
    stds, states = ema.get("stds"), ema["emas"]
    if not isinstance(stds, (list, tuple)) or not isinstance(states, (list, tuple)) or len(stds) != len(states):
        raise Refused("it does not have one width for each average")
    if len(stds) > _MAX_AVERAGES or not all(type(std) is float and 0 < std < 1 for std in stds):
        raise Refused("the widths of its averages are not a few numbers in (0, 1)")
    if len(set(stds)) < len(stds) or not all(isinstance(state, dict) for state in states):
        raise Refused("it has two averages of one width, or one that is not a dictionary")
    return list(zip(stds, states, strict=True))


def _inferred_config(state: dict[str, StoredTensor]) -> dict[str, Any]:
    """The configuration that names and shapes of a state dict determine (spec 3.3)."""

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in state or len(state[name].shape) != dims:
            raise Refused(f"it has no tensor {name} of {dims} dimensions")
        return state[name].shape

    convs = [match for name in state if (match := re.fullmatch(r"unet\.enc\.(\d{1,5})x\1_conv\.weight", name))]
    if len(convs) != 1:
        raise Refused("its network has not one input convolution")
    resolution = int(convs[0][1])
    width, inputs = shape(convs[0][0], 4)[:2]
    if resolution == 0 or width == 0:
        raise Refused("its network has no resolution or no channels")
    levels: dict[int, set[int]] = {}
    attention: set[int] = set()
    for name in state:
        if match := re.fullmatch(r"unet\.enc\.(\d{1,5})x\1_block(\d{1,3})\.(conv_res1|attn_proj)\.weight", name):
            levels.setdefault(int(match[1]), set()).add(int(match[2]))
            if match[3] == "attn_proj":
                attention.add(int(match[1]))
    if not levels:
        raise Refused("its network has no encoder blocks")
    resolutions = sorted(levels, reverse=True)
    widths = [shape(f"unet.enc.{res}x{res}_block0.conv_res1.weight", 4)[0] for res in resolutions]
    emb, noise = shape("unet.emb_noise.weight", 2)
    config: dict[str, Any] = {
        "img_resolution": resolution,
        "img_channels": inputs - 1,
        "label_dim": shape("unet.emb_label.weight", 2)[1] if "unet.emb_label.weight" in state else 0,
        "use_fp16": True,
        "sigma_data": 0.5,
        "logvar_channels": shape("logvar_linear.weight", 2)[1],
        "model_channels": width,
        "channel_mult": [_ratio(level_width, width) for level_width in widths],
        "num_blocks": len(levels[resolutions[0]]),
        "attn_resolutions": [res for res in resolutions if res in attention],
    }
    if noise != widths[0]:
        config["channel_mult_noise"] = _ratio(noise, width)
    if emb != max(widths):
        config["channel_mult_emb"] = _ratio(emb, width)
    return config


def _ratio(width: int, unit: int) -> int | float:
    return width // unit if width % unit == 0 else width / unit


def read_official(path: str | os.PathLike[str]) -> OfficialSnapshot | OfficialTrainingState:
    """A snapshot or a training state, whichever the content is. Raises UserError for anything else."""
    with _reading(path) as file:
        zipped = file.read_at(0, min(4, file.size)) == b"PK\3\4"
    return read_training_state(path) if zipped else read_snapshot(path)


# ----------------------------------------------------------------------------------------------------- files of metrics


_NETWORK: Names = {
    **_SNAPSHOT,
    **_STORAGE_TYPES,
    **{
        ("torch.jit._pickle", f"build_{kind}list"): StandIn(call=lambda values: values, counts=(1,))
        for kind in ("int", "double", "bool", "tensor")
    },
}


class _AnyNetwork(Mapping[tuple[str, str], StandIn]):
    """The names in a pickled network: any class of torch.nn or of a script stands for an inert :class:`Module`."""

    def __getitem__(self, key: tuple[str, str]) -> StandIn:
        if key in _NETWORK:
            return _NETWORK[key]
        if key[0].startswith(("torch.nn.modules.", "__torch__.")) or key[0] == "__torch__":
            return StandIn(new=lambda: Module(key[1]))
        raise KeyError(key)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(_NETWORK)

    def __len__(self) -> int:
        return len(_NETWORK)


def is_script(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a network saved as TorchScript: a zip file of torch with code in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, struct.error):
        return False


def read_feature_network(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a feature network, pickled as a persistent object (spec 9.2) or saved as TorchScript.

    The code in the file is not looked at. Raises UserError, naming the file, for anything else.
    """
    path = Path(path)
    with _reading(path) as file:
        zipped = file.read_at(0, min(4, file.size)) == b"PK\3\4"
        net = _read_zip(file, _AnyNetwork()) if zipped else _read_pickle(file, _AnyNetwork())
        if not isinstance(net, Module):
            raise Refused("it holds no network")
        tensors = _script_tensors(net) if zipped else _tensors(_modules(net))
        if sum(tensor.nbytes for tensor in tensors.values()) > file.size:
            raise Refused("its tensors are the same numbers several times")
    return {name: tensor.read() for name, tensor in tensors.items()}


def _script_tensors(net: Module) -> dict[str, StoredTensor]:
    """The tensors of a script: attributes of its modules, which are attributes of each other."""
    tensors: dict[str, StoredTensor] = {}
    visited: set[int] = set()

    def visit(prefix: str, module: Module) -> None:
        if id(module) in visited or prefix.count(".") > _MAX_DEPTH or len(module.state) > _MAX_MEMBERS:
            raise Refused("its modules contain each other, one is used twice, or there are too many")
        visited.add(id(module))
        for name, value in module.state.items():
            if isinstance(value, Module):
                visit(f"{prefix}{name}.", value)
            elif isinstance(value, StoredTensor):
                tensors[f"{prefix}{name}"] = value
            if len(tensors) > _MAX_TENSORS:
                raise Refused("it has too many tensors")

    visit("", net)
    return tensors


def read_metric_reference(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The pickled reference of the metrics (spec 7): numbers, and dictionaries of float64 arrays.

    Raises UserError, naming the file, for anything else.
    """
    path = Path(path)
    with _reading(path) as file:
        content = _read_pickle(file, _PLAIN)
        if not isinstance(content, dict):
            raise Refused("it is not a dictionary")
        return {
            key: {name: _array(array) for name, array in value.items()} if isinstance(value, dict) else value
            for key, value in content.items()
        }


def _array(array: Any) -> Any:
    if isinstance(array, _NumpyArray) and array.value is not None and array.value.dtype.kind == "f":
        return array.value.astype(np.float64)
    if type(array) in (int, float):
        return array
    raise Refused("it holds something else than numbers and arrays of them")
