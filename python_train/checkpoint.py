"""Files of a run: snapshots for use (safetensors), training states for resuming (torch zip), both written whole.

A snapshot holds one averaged network in float16 with a JSON header under the metadata key ``edm2`` (spec 5.3) and a
checksum of the whole file; a training state holds everything that the next iteration depends on (spec 9.6), with a
checksum of each record, and loads with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from edm2ext.phema import checksum
from python_train import UserError, official
from python_train.network import Precond
from python_train.pickles.names import is_official

FORMAT_VERSION = 2  # 1: snapshots had no checksum, training states no run and no loss scale
HEADER_KEYS = ("format_version", "config", "nimg", "sigma_rel", "ema_kind", "dataset", "encoder")
_HEADER_TYPES = {
    "config": dict, "nimg": int | None, "sigma_rel": float | int | None, "ema_kind": str, "dataset": dict,
    "encoder": dict,
}  # fmt: skip
_STATE_NAME = re.compile(r"training-state-(\d{7,})\.(pt|dcp)")

_UNREADABLE = (
    zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError,
)  # fmt: skip


class DamagedError(UserError):
    """A file is truncated, or its content is not what was written."""


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success it is synced to disk and renamed to ``path``.

    A reader sees the old file or the whole new one, never a part. On any failure the temporary file is removed and
    the error passes on; an OSError becomes one that names ``path`` (disk full, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def snapshot_name(nimg: int, sigma_rel: float, prefix: str = "network-snapshot") -> str:
    """File name of a snapshot, e.g. ``network-snapshot-0000128-0.050.safetensors`` (spec 5.3)."""
    return f"{prefix}-{nimg // 1000:07d}-{sigma_rel:.3f}.safetensors"


def save_snapshot(
    path: str | os.PathLike[str],
    net: Precond,
    *,
    nimg: int,
    sigma_rel: float,
    ema_kind: str,
    dataset: dict[str, Any],
    encoder: dict[str, Any],
    extra: dict[str, Any] | None = None,
    parameters: Sequence[Tensor] | None = None,
) -> None:
    """Write one network as float16 with its facts (spec 5.3).

    ``parameters`` replace ``net.parameters()`` in that order (an EMA profile); buffers are the network's own.
    ``ema_kind`` is ``"power"`` (tracked in training) or ``"phema"`` (reconstructed); ``extra`` adds header keys.
    """
    header = {
        "config": net.config,
        "nimg": nimg,
        "sigma_rel": sigma_rel,
        "ema_kind": ema_kind,
        "dataset": dataset,
        "encoder": encoder,
        **(extra or {}),
    }
    state = net.state_dict()
    if parameters is not None:
        names = [name for name, _ in net.named_parameters()]
        state.update(zip(names, parameters, strict=True))
    stream_snapshot(path, header, {name: value.shape for name, value in state.items()}, state.values())


def stream_snapshot(
    path: str | os.PathLike[str], header: dict[str, Any], shapes: dict[str, Sequence[int]], values: Iterable[Tensor]
) -> None:
    """Write a snapshot of float16 tensors that are made one after another, holding one of them at a time.

    ``values`` come in the order of ``shapes`` and are converted to float16.
    """
    header = {"format_version": FORMAT_VERSION, **{k: v for k, v in header.items() if k != "format_version"}}
    layout: dict[str, Any] = {"__metadata__": {"edm2": json.dumps(header), checksum.KEY: checksum.NONE_YET}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * torch.float16.itemsize
        layout[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(layout).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        sealed = checksum.SealedWriter(file, len(text).to_bytes(8, "little") + text)
        for shape, value in zip(shapes.values(), values, strict=True):
            if tuple(value.shape) != tuple(shape):
                raise ValueError(f"stream_snapshot: expected a tensor of shape {list(shape)}, got {list(value.shape)}")
            sealed.write(memoryview(value.detach().to("cpu", torch.float16).contiguous().flatten().numpy()))
        sealed.seal()


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON header of a snapshot. Raises UserError naming the file if it is missing, damaged or something else. The
    checksum is compared by :func:`read_tensors` only.

    Pickles of the EDM2 reference program are read too (:mod:`python_train.official`).
    """
    path = Path(path)
    if is_official(path):
        return official.read_snapshot(path).header
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a snapshot in it")
    if not path.is_file():
        raise UserError(f"no such snapshot: {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedError(f"{path} is damaged or not a safetensors file ({error})") from error
    try:
        header = dict(json.loads(metadata["edm2"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a snapshot of this program: its metadata has no 'edm2' header") from error
    missing = [key for key in HEADER_KEYS if key not in header]
    if missing:
        raise UserError(f"{path}: the snapshot header lacks {', '.join(missing)}")
    require_known(path, header["format_version"])
    for key, kinds in _HEADER_TYPES.items():
        if not isinstance(header[key], kinds):
            raise UserError(f"{path}: the snapshot header has the {key} {header[key]!r:.40}")
    return header


def require_known(path: Path, version: Any) -> None:
    """Raise UserError unless this program reads files of this format version."""
    if version not in range(1, FORMAT_VERSION + 1):
        raise UserError(f"{path} has format version {version}; this program reads 1 to {FORMAT_VERSION}")


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a snapshot as they are stored, on the CPU. Raises UserError if any bit of the file has changed
    since it was written (files of format 1 have no checksum: there it shows only where the layout is wrong)."""
    path = Path(path)
    if is_official(path):
        return {name: tensor.read() for name, tensor in official.read_snapshot(path).tensors.items()}
    header = read_header(path)
    try:
        require_intact(path, header["format_version"])
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error


def require_intact(path: Path, version: int) -> None:
    """Raise DamagedError if a bit of a snapshot of this format version has changed. Reads all of it."""
    intact = checksum.is_intact(path)
    if intact is False or (intact is None and version > 1):
        raise DamagedError(f"{path} is damaged: its content does not match its checksum")


def load_snapshot(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[Precond, dict[str, Any]]:
    """Load a snapshot as ``(network in eval mode with fp32 weights and no gradients, header)``.

    Raises UserError naming the file if it is missing, truncated, or its tensors do not fit its own configuration.
    """
    header = read_header(path)
    tensors = read_tensors(path)
    try:
        config = header["config"]
        if config.get("num_blocks", 0) * len(config.get("channel_mult", ())) > len(tensors):
            raise ValueError("it has fewer tensors than blocks")  # of which there could be any number
        with torch.device("meta"):
            net = Precond(**config)
        state = {name: value.to(device, torch.float32) for name, value in tensors.items()}
        net.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise DamagedError(f"{path}: the snapshot is damaged or does not fit its configuration ({error})") from error
    return net.eval().requires_grad_(False), header


def state_name(nimg: int, sharded: bool = False) -> str:
    """File name of a training state, e.g. ``training-state-0000128.pt``; ``.dcp`` for the folder that
    `python_train.sharded_state` writes."""
    return f"training-state-{nimg // 1000:07d}.{'dcp' if sharded else 'pt'}"


def is_state(path: Path) -> bool:
    """Whether the path has the name of a training state."""
    return _STATE_NAME.fullmatch(path.name) is not None


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a training state (tensors, numbers, strings, lists and dicts only) atomically."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        writer = _Writer(file)
        try:
            torch.save(state, writer)
        except RuntimeError:
            if writer.error is None:
                raise
            raise writer.error from None


class _Writer:
    """A file that remembers why a write failed: torch's zip writer reports it as a RuntimeError about positions."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None
        self.flush = file.flush

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def list_states(run_dir: str | os.PathLike[str]) -> list[Path]:
    """The training states of a run, newest first."""
    matches = [(match, path) for path in Path(run_dir).iterdir() if (match := _STATE_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(matches, key=lambda item: int(item[0][1]), reverse=True)]


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a training state on the CPU. Raises DamagedError if the file is truncated or something of it has changed,
    and UserError, naming the version, if it is of a format that this program does not know."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself does not compare the stored checksums
        if damaged is not None:
            raise DamagedError(f"{path} is damaged: {damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"{path} is damaged ({error})") from error
    if not isinstance(state, dict) or "format_version" not in state:
        raise DamagedError(f"{path} is not a training state of this program")
    require_known(path, state["format_version"])
    return state


def state_facts(path: Path) -> tuple[str, int] | None:
    """(run, nimg) of a training state, whose tensors are not read. None if it does not tell."""
    with contextlib.suppress(*_UNREADABLE):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state["run"], state["nimg"]
    return None
