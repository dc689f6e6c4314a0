"""Making a data set: work in chunks that survive an interruption; the result appears whole or not at all."""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from python_train import UserError
from python_train.checkpoint import atomic_write
from python_train.data.container import INDEX, Index, Source, write_folder, write_zip

Task, Result = TypeVar("Task"), TypeVar("Result")


class Staging:
    """The unfinished data set ``dest``, a ZIP or folder: chunks of it in the folder ``.<name>.partial`` beside it.

    A context manager; UserError if ``dest`` exists, or another process is at it. What an interruption leaves behind is
    taken up by the next attempt: a chunk's name holds a digest of everything it was made from. Of several processes
    that work together only one is the ``owner``.
    """

    def __init__(self, dest: str | os.PathLike[str], owner: bool = True) -> None:
        self.dest = Path(dest)
        self.owner = owner
        self.folder = self.dest.with_name(f".{self.dest.name}.partial")

    def __enter__(self) -> Staging:
        if self.dest.exists() or self.dest.is_symlink():
            raise UserError(f"{self.dest} exists already; choose another name, or remove it first")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.owner:
            return self
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise UserError(f"another process is making {self.dest}") from error
        for unfinished in self.folder.glob(".*.tmp"):  # of a process that was killed
            unfinished.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.owner:
            return
        if self.folder.exists() and not any(path.suffix == ".zip" for path in self.folder.iterdir()):
            shutil.rmtree(self.folder)  # nothing to go on from
        os.close(self._lock)

    def chunk(self, number: int, made_from: object) -> Path:
        """Where chunk ``number`` is kept, or shall be written, whole."""
        digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:20]
        return self.folder / f"chunk-{number:06d}-{digest}.zip"

    def finish(self, items: Iterable[tuple[str, bytes]], index: Callable[[], Index]) -> None:
        """Write ``dest`` from all items and, after the last of them, its ``dataset.json``; drop the chunks."""

        def files() -> Iterator[tuple[str, bytes]]:
            yield from items
            yield INDEX, index().to_json().encode()

        whole = self.folder / "whole"
        if whole.is_dir():
            shutil.rmtree(whole)
        if self.dest.suffix.lower() == ".zip":
            write_zip(whole, files())
            with open(whole, "rb") as file:
                os.fsync(file.fileno())
        else:
            write_folder(whole, files())
            os.sync()  # at once; a file at a time takes hours for a million of them
        os.rename(whole, self.dest)
        shutil.rmtree(self.folder)


def write_chunk(path: Path, items: Iterable[tuple[str, bytes]]) -> None:
    """Write a chunk atomically."""
    with atomic_write(path) as temporary:
        write_zip(temporary, items)


def open_chunk(path: Path) -> Source:
    """A chunk, to be read."""
    return Source(path, lambda _: True)


# ---------------------------------------------------------------------------------------------------------- processes


def default_workers() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Results of ``function``, in the order of completion, from as many processes; with one worker from this one.

    Raises the first error; UserError if a process is killed. Tasks not begun by then are dropped. The processes end at
    once when this one is interrupted, and when it is gone, however it ended.
    """
    if workers <= 1 or len(tasks) <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["python_train.data"])
    ends, here = context.Pipe(duplex=False)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)), context, initializer=_work_until_it_ends, initargs=(ends,)
    )
    try:
        for future in concurrent.futures.as_completed([pool.submit(function, task) for task in tasks]):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed (out of memory?); fewer --workers need less, and the same command goes on "
            "from where it was"
        ) from error
    except KeyboardInterrupt:
        here.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        here.close()
        ends.close()


def _work_until_it_ends(ends: Connection) -> None:
    """In a worker: leave interrupts to the process that it works for, and end when that closes its end of a pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(ends,), daemon=True).start()


def _end_with(ends: Connection) -> None:
    ends.poll(None)
    os._exit(1)


def chunked(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """``items`` in runs of ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))
