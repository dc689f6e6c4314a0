"""Files that are written at all places at once and appear when all of them are whole; an interrupted job continues."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from edm2ext.phema.stored import PAGE, layout_bytes
from edm2ext.phema.stream import Combination

_MOST_OPEN = 256
_SYNCED_TOGETHER = 8
_SECONDS_BETWEEN_SYNCS = 20.0


class OutputFiles:
    """The safetensors files of a combination's outputs, for `stream` to write into.

    Until `commit` they have hidden names that end in ``.part``; a journal beside them says how far they are written.
    Opened again for the same inputs, coefficients (of the same `kind`) and outputs, they are continued from
    `position`. Raises OSError if the disk has no room for all of them, ValueError if another process writes them.
    """

    def __init__(
        self,
        combination: Combination,
        paths: Sequence[Path],
        metadata: Sequence[dict[str, str]],
        dtype: torch.dtype = torch.float16,
        kind: str = "",
    ) -> None:
        self.combination, self.paths, self.dtype, self.kind = combination, list(paths), dtype, kind
        self._layout = self._tensors()
        first = next(iter(combination.offsets()), None)
        self._heads = [layout_bytes(self._layout, entry, first) for entry in metadata]
        name = self._fingerprint()
        self._parts = [path.with_name(f".{path.name}.{name}.part") for path in self.paths]
        self._journal_path = self.paths[0].with_name(f".reconstruct.{name}.json")
        for folder in {path.parent for path in self.paths}:
            folder.mkdir(parents=True, exist_ok=True)
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT, 0o666)
        self._files: dict[int, tuple[int, bool]] = {}
        self._synced = time.monotonic()
        self._noting: Future[None] | None = None
        self._noter = ThreadPoolExecutor(1, "sync")
        try:
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"another process is writing {self.paths[0]}") from error
            self.position = self._resume()
            if self.position == 0:
                self._create()
            for i, part in enumerate(self._parts[:_MOST_OPEN]):
                if part.exists():
                    self._files[i] = _open(part)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OutputFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close()
        if kind is not None and issubclass(kind, ValueError):
            self.discard()  # an input is damaged: there is nothing to continue with

    def sinks(self) -> list[_Sink]:
        """One for each output."""
        start = next(iter(self.combination.offsets()), None)
        return [_Sink(self, i, head[1][start] if start else 0) for i, head in enumerate(self._heads)]

    def write(self, i: int, values: Tensor, position: int) -> None:
        """Put a vector into file i; whole pages go to the disk from its own memory where the file system takes that."""
        content, end = memoryview(values.view(torch.uint8).numpy()), position + values.nbytes
        descriptor, direct = self._files.get(i, (None, False))
        first, stop = position + -position % PAGE, end - end % PAGE
        try:
            if direct and first < stop and (values.data_ptr() + first - position) % PAGE == 0:
                self._write(i, None, content[: first - position], position)
                try:
                    self._write(i, descriptor, content[first - position : stop - position], first)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._write(i, None, content[first - position : stop - position], first)
                self._write(i, None, content[stop - position :], stop)
            else:
                self._write(i, None if direct else descriptor, content, position)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.paths[i]}: {error.strerror or error}") from error

    def _write(self, i: int, descriptor: int | None, content: memoryview, position: int) -> None:
        if len(content) == 0:
            return
        target = os.open(self._parts[i], os.O_WRONLY) if descriptor is None else descriptor
        try:
            done = 0
            while done < len(content):
                done += os.pwrite(target, content[done:], position + done)
        finally:
            if descriptor is None:
                os.close(target)

    def written(self, position: int) -> None:
        """Note, now and then, that all elements before `position` are written; another thread waits for the disk."""
        if self._noting is not None and self._noting.done():
            self._noting.result()
            self._noting = None
        if self._noting is None and time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            self._noting = self._noter.submit(self._note, position)

    def commit(self) -> None:
        """Give the files their names."""
        if self._noting is not None:
            self._noting.result()
        self._note(self.combination.numel)
        for part, path in zip(self._parts, self.paths, strict=True):
            if part.exists():
                os.replace(part, path)
        for folder in {path.parent for path in self.paths}:
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        self._journal_path.unlink()
        for path in self.paths:
            _remove_leftovers(path)

    def close(self) -> None:
        self._noter.shutdown()
        while self._files:
            os.close(self._files.popitem()[1][0])
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def discard(self) -> None:
        """Remove what is not finished."""
        for path in (*self._parts, self._journal_path):
            path.unlink(missing_ok=True)

    def _tensors(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """All tensors in an order in which each starts at a multiple of its numbers' size, the averaged ones together
        in the combination's order."""
        averaged = [(n, self.dtype, self.combination.shape(n)) for n in self.combination.offsets()]
        copied = [(n, self._copied_dtype(n), self.combination.shape(n)) for n in self.combination.copied]
        copied.sort(key=lambda item: -item[1].itemsize)
        wide = [item for item in copied if item[1].itemsize >= self.dtype.itemsize]
        return [*wide, *averaged, *copied[len(wide) :]]

    def _copied_dtype(self, name: str) -> torch.dtype:
        dtype = self.combination.inputs[0].tensors[name].dtype
        return self.dtype if dtype.is_floating_point else dtype

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for average in self.combination.inputs:
            status = average.path.stat()
            digest.update(f"{average.path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
        for path, head in zip(self.paths, self._heads, strict=True):
            digest.update(f"{path.resolve()} {head[2]}\n".encode() + head[0])
        for span in self.combination.spans:
            digest.update(f"{span.names} {span.group} {span.dtypes}\n".encode())
        for coefs in self.combination.coefs:  # whose last bits may differ when they are solved for again
            digest.update(f"{self.kind} {(coefs.numpy().round(3) + 0.0).tolist()}\n".encode())
        return digest.hexdigest()[:16]

    def _resume(self) -> int:
        """How far the files are written already; 0 if any is missing."""
        try:
            position = json.loads(os.pread(self._journal, 1000, 0))["position"]
        except (ValueError, KeyError, TypeError):
            return 0
        there = [
            part.exists() and part.stat().st_size == h[2] for part, h in zip(self._parts, self._heads, strict=True)
        ]
        if position == self.combination.numel:  # interrupted while the files got their names
            there = [part or path.exists() for part, path in zip(there, self.paths, strict=True)]
        return position if all(there) else 0

    def _create(self) -> None:
        """New files of the full size, so that a full disk is noticed at once."""
        try:
            for i, (part, (head, starts, size)) in enumerate(zip(self._parts, self._heads, strict=True)):
                with open(part, "wb") as file:
                    if size:
                        os.posix_fallocate(file.fileno(), 0, size)
                    file.write(head)
                    for name in self.combination.copied:
                        value = self.combination.read_copied(name, i).to(self._copied_dtype(name))
                        file.seek(starts[name])
                        file.write(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        except OSError as error:
            self.discard()
            total = sum(head[2] for head in self._heads)
            why = f"no room for the {total / 1e9:.1f} GB" if error.errno == errno.ENOSPC else error.strerror
            raise OSError(error.errno, f"cannot write {self.paths[0].parent}: {why}") from error
        except BaseException:
            self.discard()
            raise

    def _note(self, position: int) -> None:
        with ThreadPoolExecutor(_SYNCED_TOGETHER) as pool:
            list(pool.map(_sync, [part for part in self._parts if part.exists()]))
        content = json.dumps({"position": position}).encode()
        os.pwrite(self._journal, content, 0)
        os.ftruncate(self._journal, len(content))
        os.fdatasync(self._journal)
        self._synced = time.monotonic()


def _open(path: Path) -> tuple[int, bool]:
    """To write to: the descriptor, and whether it takes whole pages only, past the system's cache: outputs are many
    times what memory holds, and are not read again."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_WRONLY), False


def _sync(path: Path) -> None:
    """Wait until what is written of a file is on the disk."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove parts of a file that has appeared by now, which other jobs began that nobody continues."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        journal = part.with_name(f".reconstruct.{part.name.split('.')[-2]}.json")
        try:
            descriptor = os.open(journal, os.O_RDONLY)
        except OSError:  # its first output went to another folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink(missing_ok=True)
            if not list(part.parent.glob(f".*.{part.name.split('.')[-2]}.part")):
                journal.unlink(missing_ok=True)
        except OSError:  # another process works on it
            continue
        finally:
            os.close(descriptor)


class _Sink:
    """The averaged tensors of one file (`edm2ext.phema.stream.Sink`)."""

    def __init__(self, files: OutputFiles, index: int, start: int) -> None:
        self.files, self.index, self.start = files, index, start

    def write(self, first: int, values: Tensor) -> None:
        self.files.write(self.index, values, self.start + first * values.element_size())
