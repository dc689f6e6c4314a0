"""Stored averages as files of tensors that are read by position: safetensors, with or without eight more bits beside.

Tensors stay in the file until a part of them is asked for. `save_average` writes what `open_average` reads; anybody's
safetensors of floating-point tensors are read as well.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from edm2ext.phema import checksum
from edm2ext.phema.fit import ROUNDING, STORAGE_OF_DTYPE

BYTES = {"fp16": 2, "fp16+8": 3, "fp32": 4}  # that a weight takes, by what `save_average` calls its storage
STORAGES = tuple(BYTES)
HEADER = "edm2"  # metadata key of the JSON header: nimg, sigma_rel and whatever else
RESIDUAL_SUFFIX = ".residual"  # no snapshot by its name, so that nothing takes it for one
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}
PAGE = 4096  # bytes of the pieces that a disk may be given from the program's own memory
_MOST_OPEN = 256  # files kept open between reads


class OpenFiles:
    """Files that are read by position from several threads; the first so many stay open."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._open: dict[Path, int] = {}
        try:
            for path in list(dict.fromkeys(paths))[:_MOST_OPEN]:
                self._open[path] = os.open(path, os.O_RDONLY)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close them all."""
        while self._open:
            os.close(self._open.popitem()[1])

    def read_into(self, path: Path, position: int, target: Tensor) -> None:
        """Fill a contiguous CPU tensor from this position. ValueError if the file ends before."""
        if target.numel() == 0:
            return
        view = memoryview(target.view(torch.uint8).numpy())
        descriptor = self._open.get(path)
        opened = os.open(path, os.O_RDONLY) if descriptor is None else None
        try:
            done = 0
            while done < len(view):
                count = os.preadv(opened if descriptor is None else descriptor, [view[done:]], position + done)
                if count == 0:
                    raise ValueError(f"{path} is damaged: it ends before byte {position + len(view)}")
                done += count
        finally:
            if opened is not None:
                os.close(opened)


class Source(Protocol):
    """A tensor in a file."""

    @property
    def dtype(self) -> torch.dtype: ...  # of what `read` gives

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def storage(self) -> str: ...  # a key of `ROUNDING`, or "" where it is not one of floating point

    def read(self, files: OpenFiles, first: int, target: Tensor) -> None:
        """Fill target [count] with the elements from `first`, in row-major order."""


@dataclass(frozen=True)
class StoredTensor:
    """Contiguous little-endian numbers in a file, from byte `start`."""

    path: Path
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]

    @property
    def storage(self) -> str:
        return STORAGE_OF_DTYPE.get(self.dtype, "")

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def read(self, files: OpenFiles, first: int, target: Tensor) -> None:
        files.read_into(self.path, self.start + first * self.dtype.itemsize, target)


@dataclass(frozen=True)
class RefinedTensor:
    """A float16 tensor and, in another file, the int8 `residual` of it: read as float32 with eight more bits."""

    coarse: StoredTensor
    residual: StoredTensor
    dtype: torch.dtype = torch.float32
    storage: str = "fp16+8"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.coarse.shape

    def read(self, files: OpenFiles, first: int, target: Tensor) -> None:
        coarse = torch.empty(len(target), dtype=torch.float16)
        fine = torch.empty(len(target), dtype=torch.int8)
        self.coarse.read(files, first, coarse)
        self.residual.read(files, first, fine)
        refine(coarse, fine, out=target)


def spacing(x: Tensor) -> Tensor:
    """The distance of a float16 number from the next larger in magnitude, in float32."""
    exponent = (x.view(torch.int16).to(torch.int32) >> 10) & 31  # biased by 15; the mantissa has ten bits
    return ((exponent.clamp(min=1) - 15 - 10 + 127) << 23).view(torch.float32)


def residual(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as float16, and what is left over in 256ths of its spacing, as int8."""
    coarse = x.to(torch.float16)
    finite = coarse.isfinite()
    fine = ((x.to(torch.float32) - coarse.to(torch.float32)) / spacing(coarse) * 256).round_().clamp_(-128, 127)
    return coarse, torch.where(finite, fine, 0).to(torch.int8)


def refine(coarse: Tensor, fine: Tensor, out: Tensor | None = None) -> Tensor:
    """The float32 numbers that `residual` made float16 and int8 ones of."""
    return torch.addcmul(coarse.to(torch.float32), fine.to(torch.float32), spacing(coarse), value=1 / 256, out=out)


@dataclass(frozen=True)
class StoredAverage:
    """A stored average: when it was taken, the width of its profile, and its tensors by name, in the file's order.

    copied: names of the tensors that are not averages (buffers): a reconstruction takes them as they are.
    """

    path: Path
    nimg: float
    sigma_rel: float
    tensors: Mapping[str, Source]
    header: Mapping[str, Any] = field(default_factory=dict)
    copied: frozenset[str] = frozenset()

    @property
    def storage(self) -> str:
        """The coarsest way in which one of its averaged tensors is stored."""
        kinds = {source.storage for name, source in self.tensors.items() if name not in self.copied}
        return max(kinds - {""}, key=ROUNDING.__getitem__, default="fp32")


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Each name of a state dict, and it without the parts that torch.compile and DistributedDataParallel put into it:
    ``module.`` in front of all of them is the latter's."""
    clean = {name: name.replace("_orig_mod.", "") for name in names}
    if all(name.startswith("module.") for name in clean.values()):
        clean = {name: short.removeprefix("module.") for name, short in clean.items()}
    return clean


def open_average(
    path: str | os.PathLike[str], *, nimg: float | None = None, sigma_rel: float | None = None
) -> StoredAverage:
    """Read the header of a safetensors file; `nimg` and `sigma_rel` where the file itself does not tell.

    All of a float16 file's bits and those of its `RESIDUAL_SUFFIX` file, if that lies beside it, are used. Raises
    ValueError naming the file if it is missing, damaged or does not tell its time and width.
    """
    path = Path(path)
    metadata, tensors = read_layout(path)
    try:
        header = json.loads(metadata.get(HEADER, "{}"))
        nimg = header["nimg"] if nimg is None else nimg
        sigma_rel = header["sigma_rel"] if sigma_rel is None else sigma_rel
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not tell its time and width (no nimg and sigma_rel in its header)") from error
    names = clean_names(tensors)
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path} holds the same parameter under the names of a plain and a compiled module")
    copied = {names[name] for name, t in tensors.items() if not t.dtype.is_floating_point}
    copied |= {names[name] for name in header.get("buffers", []) if name in names}
    refined = with_residual(path, header, tensors)
    return StoredAverage(
        path,
        nimg,
        sigma_rel,
        {names[n]: t for n, t in refined.items()},
        header,
        frozenset(copied),
    )


def with_residual(
    path: Path, header: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor | RefinedTensor]:
    """The tensors, with the eight more bits that lie in a file beside theirs, if it is there."""
    beside = residual_path(path)
    if "residual" not in header or not beside.exists():
        return dict(tensors)
    metadata, fine = read_layout(beside)
    if metadata.get("residual") != header["residual"]:
        raise ValueError(f"{beside} does not belong to {path.name}: one of the two was replaced")
    for name, tensor in fine.items():
        if name not in tensors or tensors[name].shape != tensor.shape or tensor.dtype != torch.int8:
            raise ValueError(f"{beside}: the tensor {name} does not fit that of {path.name}")
    return {n: RefinedTensor(t, fine[n]) if n in fine else t for n, t in tensors.items()}


def residual_path(path: Path) -> Path:
    """Where the eight more bits of a snapshot lie."""
    return path.with_name(path.name.removesuffix(".safetensors") + RESIDUAL_SUFFIX)


def read_layout(path: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Metadata and tensors of a safetensors file, in the file's order. ValueError if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with safetensors.safe_open(path, "pt"):  # checks the layout against the file's size
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            layout = json.loads(file.read(size))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from error
    metadata = layout.pop("__metadata__", {})
    tensors = {}
    for name, entry in sorted(layout.items(), key=lambda item: item[1]["data_offsets"][0]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} is of the type {entry['dtype']}, which cannot be averaged")
        start = 8 + size + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, DTYPES[entry["dtype"]], start, tuple(entry["shape"]))
    return metadata, tensors


def layout_bytes(
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str], paged: str | None = None
) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a safetensors file of these tensors: (bytes, where each tensor starts, size of the file).

    paged: the tensor that shall start at a multiple of `PAGE`, if the others leave that to the header's length.
    """
    layout: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ends, end = {}, 0
    for name, dtype, shape in tensors:
        ends[name] = end
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        layout[name] = {"dtype": NAME_OF_DTYPE[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(layout).encode()
    text += b" " * (-len(text) % 8)
    if paged is not None and ends[paged] % 8 == 0:
        text += b" " * (-(8 + len(text) + ends[paged]) % PAGE)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in ends.items()}, len(head) + end


def save_average(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    storage: str = "fp16",
    *,
    copied: Iterable[str] = (),
) -> None:
    """Write one average: ``nimg`` and ``sigma_rel`` are in the header, everything else in it is for the reader.

    Floating-point tensors are stored as "fp16", "fp32", or "fp16+8": a float16 file as any other, and beside it one of
    int8 tensors with the next eight bits, which `open_average` puts together again (3 bytes a weight; the loss of
    rounding is 1/256 of that of float16). `copied` are not averaged, and stored as the averages are. The file appears
    whole or not at all. Raises ValueError for an unknown storage or a header without time and width.
    """
    path, copied = Path(path), set(copied)
    if storage not in STORAGES:
        raise ValueError(f"save_average: storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    if not {"nimg", "sigma_rel"} <= header.keys():
        raise ValueError("save_average: the header must tell nimg and sigma_rel")
    dtype = torch.float32 if storage == "fp32" else torch.float16
    values = {name: tensor.detach() for name, tensor in tensors.items()}
    header = dict(header)
    if copied:
        header["buffers"] = sorted(copied)
    if storage == "fp16+8":
        header["residual"] = secrets.token_hex(8)
        fine = [(n, v) for n, v in values.items() if v.is_floating_point() and n not in copied]
        layout = [(name, torch.int8, value.shape) for name, value in fine]
        write_tensors(
            residual_path(path), layout, {"residual": header["residual"]}, (residual(v.cpu())[1] for _, v in fine)
        )
    layout = [(n, dtype if v.is_floating_point() else v.dtype, v.shape) for n, v in values.items()]
    layout.sort(key=lambda item: -item[1].itemsize)  # every tensor starts at a multiple of its numbers' size
    converted = (values[name].to("cpu", dtype) for name, dtype, _ in layout)
    write_tensors(path, layout, {HEADER: json.dumps(header)}, converted)
    if storage != "fp16+8":
        residual_path(path).unlink(missing_ok=True)


def write_tensors(
    path: Path,
    layout: Sequence[tuple[str, torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str],
    values: Iterable[Tensor],
) -> None:
    """Write a safetensors file of tensors that are made one after another, with a checksum; it appears whole or not at
    all."""
    head, _, _ = layout_bytes(layout, {**metadata, checksum.KEY: checksum.NONE_YET})
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        sealed = checksum.SealedWriter(file, head)
        for _, value in zip(layout, values, strict=True):
            sealed.write(memoryview(value.contiguous().flatten().view(torch.uint8).numpy()))
        sealed.seal()
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which is renamed to it at the end, or removed after an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
