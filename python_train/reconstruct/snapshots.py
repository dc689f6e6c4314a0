"""The stored averages of a run: which files they are, and their tensors as the streaming sums read them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm2ext.phema import StoredAverage
from edm2ext.phema.fit import STORAGE_OF_DTYPE
from edm2ext.phema.stored import OpenFiles, Source, StoredTensor, read_layout, residual_path, with_residual
from python_train import UserError, official
from python_train.checkpoint import read_header, require_intact
from python_train.network import Precond
from python_train.pickles.names import is_official
from python_train.pickles.tensors import StoredTensor as PickledTensor

_SNAPSHOT_NAME = re.compile(r"(.*)-(\d+)-(\d+\.\d+)\.(safetensors|pkl)")


@dataclass(frozen=True)
class Snapshot:
    """A stored average: where it lies and what its header says."""

    path: Path
    header: dict[str, Any]

    @property
    def nimg(self) -> int:
        """Images seen when it was taken."""
        return self.header["nimg"]

    @property
    def sigma_rel(self) -> float:
        """Relative width of its averaging profile."""
        return self.header["sigma_rel"]


@dataclass(frozen=True)
class StridedTensor:
    """Numbers in a file whose order is not that of the tensor's elements, as pickles may have them."""

    path: Path
    dtype: torch.dtype
    start: int  # byte of the first element
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def storage(self) -> str:
        return STORAGE_OF_DTYPE.get(self.dtype, "")

    def read(self, files: OpenFiles, first: int, target: Tensor) -> None:
        """Fill target with the elements from `first`, in row-major order; reads all that lies between them."""
        index = torch.arange(first, first + len(target))
        places = torch.zeros_like(index)
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            places += index % size * step
            index //= size
        lowest, highest = int(places.min()), int(places.max())
        between = torch.empty(highest - lowest + 1, dtype=self.dtype)
        files.read_into(self.path, self.start + lowest * self.dtype.itemsize, between)
        target.copy_(between[places - lowest])


def find_snapshots(indir: Path, prefix: str | None = None, sigma_rels: Sequence[float] | None = None) -> list[Snapshot]:
    """Snapshots of a folder by name, ordered by (nimg, sigma_rel); optionally only one prefix or some widths.

    Pickles of the EDM2 reference program count too, unless they lie there converted as well. Without a prefix, networks
    that were reconstructed themselves are left out. Raises UserError if the folder is
    missing, a file is unreadable, or nothing is left.
    """
    if not indir.is_dir():
        raise UserError(f"no such folder: {indir}")
    names = [(match, path) for path in sorted(indir.iterdir()) if (match := _SNAPSHOT_NAME.fullmatch(path.name))]
    paths = [path for match, path in names if prefix is None or match[1] == prefix]
    paths = [path for path in paths if path.suffix != ".pkl" or path.with_suffix(".safetensors") not in paths]
    snapshots = [Snapshot(path, read_header(path)) for path in paths]
    if prefix is None:
        snapshots = [snapshot for snapshot in snapshots if snapshot.header["ema_kind"] == "power"]
    if sigma_rels is not None:
        snapshots = [s for s in snapshots if any(abs(s.sigma_rel - wanted) < 5e-4 for wanted in sigma_rels)]
    if not snapshots:
        raise UserError(f"{indir} holds no {prefix or 'network-snapshot'}-*.safetensors or .pkl files that fit")
    return sorted(snapshots, key=lambda snapshot: (snapshot.nimg, snapshot.sigma_rel))


def check_consistent(snapshots: Sequence[Snapshot]) -> None:
    """Raise UserError, naming two files, if they are not of one run or hold the same average."""
    first = snapshots[0]
    seen: dict[tuple[int, float], Path] = {}
    for snapshot in snapshots:
        for key in ("config", "dataset", "encoder"):
            if snapshot.header[key] != first.header[key]:
                raise UserError(f"{snapshot.path} and {first.path} are not of one run: their {key} differs")
        profile = (snapshot.nimg, snapshot.sigma_rel)
        if profile in seen:
            raise UserError(f"{snapshot.path} and {seen[profile]} hold the same average; name one run's files only")
        seen[profile] = snapshot.path


def target_time(snapshots: Sequence[Snapshot], out_nimg: int | None = None) -> int:
    """The time to reconstruct for: the latest input's, or out_nimg, which must be an input's. UserError otherwise."""
    times = sorted({snapshot.nimg for snapshot in snapshots if snapshot.nimg > 0})
    if not times:
        raise UserError("the only snapshots are those at 0 images, which hold nothing to average")
    if out_nimg is None:
        return times[-1]
    if out_nimg not in times:
        known = ", ".join(f"{time // 1000}" for time in times)
        raise UserError(f"no snapshot was taken at {out_nimg} images; there are some at (thousands): {known}")
    return out_nimg


def open_snapshots(snapshots: Sequence[Snapshot]) -> list[StoredAverage]:
    """The snapshots of one run, for `edm2ext.phema.Reconstruction`; their weights stay in the files.

    Raises UserError if a file is damaged or its tensors are not those that its network has.
    """
    check_consistent(snapshots)
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(_require_intact, snapshots):
            pass
    with torch.device("meta"):
        net = Precond(**snapshots[0].header["config"])
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    buffers = frozenset(shapes.keys() - {name for name, _ in net.named_parameters()})
    return [_open(snapshot, shapes, buffers) for snapshot in snapshots]


def _require_intact(snapshot: Snapshot) -> None:
    if not is_official(snapshot.path):
        require_intact(snapshot.path, snapshot.header["format_version"])
        beside = residual_path(snapshot.path)
        if beside.exists():
            require_intact(beside, snapshot.header["format_version"])


def _open(snapshot: Snapshot, shapes: Mapping[str, tuple[int, ...]], buffers: frozenset[str]) -> StoredAverage:
    path, tensors = snapshot.path, _tensors(snapshot)
    for name in shapes.keys() | tensors.keys():
        if name not in shapes or name not in tensors or tensors[name].shape != shapes[name]:
            raise UserError(f"{path}: the tensor {name} is missing, unknown or of a wrong shape")
    return StoredAverage(path, snapshot.nimg, snapshot.sigma_rel, tensors, snapshot.header, buffers)


def _tensors(snapshot: Snapshot) -> dict[str, Source]:
    if is_official(snapshot.path):
        return {name: in_pickle(t) for name, t in official.read_snapshot(snapshot.path).tensors.items()}
    try:
        _, tensors = read_layout(snapshot.path)
        return dict(with_residual(snapshot.path, snapshot.header, tensors))
    except ValueError as error:
        raise UserError(str(error)) from error


def in_pickle(tensor: PickledTensor) -> Source:
    """A tensor in a file of the reference, for reading a part of it."""
    start = tensor.storage.start + tensor.offset * tensor.dtype.itemsize
    dense = [math.prod(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape))]
    if all(step == packed or size == 1 for step, packed, size in zip(tensor.stride, dense, tensor.shape, strict=True)):
        return StoredTensor(tensor.storage.path, tensor.dtype, start, tensor.shape)
    return StridedTensor(tensor.storage.path, tensor.dtype, start, tensor.shape, tensor.stride)
