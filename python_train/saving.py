"""Snapshots and training states are written by a thread, while training goes on (spec 4.8, items 2 and 3; 5.3)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from python_train import checkpoint, retention, sharded_state
from python_train.run_dir import RunDir
from python_train.snapshot_storage import save_tracked, tracked
from python_train.trainer import Trainer

Work = Callable[[], None]


class Writer:
    """A thread that does one piece of work after the other.

    What fails there is raised by the next call of any method, so that no error is lost, and what was handed over after
    it is not begun: files appear in their order. The interpreter does not end before the work is done.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._pending: Future[None] | None = None

    def submit(self, work: Work) -> None:
        """Begin ``work`` as soon as what is pending is done, which this waits for: one piece at most is in memory."""
        self.wait()
        self._pending = self._pool.submit(work)

    def check(self) -> None:
        """Raise what went wrong so far. Waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when everything is written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


class Saver:
    """Saves one run; every process calls it, and the first, which has the ``run``, writes.

    What is to be written, which later steps change, is copied to the CPU; on a GPU the copies are queued behind the
    step that was launched last, and nothing waits for them here. A state that is shared out over the processes is
    written by all of them at once, who then speak to each other by a process group of their own.
    """

    def __init__(self, trainer: Trainer, run: RunDir | None, dataset: dict[str, Any], encoder: dict[str, Any]) -> None:
        self.trainer = trainer
        self.run = run
        self.facts = {"dataset": dataset, "encoder": encoder}
        self.writer = Writer()
        self._group = None if trainer.shards is None else torch.distributed.new_group(backend="gloo")

    def save(self, snapshots: bool, state: bool, elapsed: float) -> None:
        """Write a snapshot of each tracked average (spec 5.3), or the training state, or both, in this order: a run
        that resumes from a state does not make the snapshots before it again. Raises what went wrong so far."""
        self.writer.check()
        if not (snapshots or state):
            return
        self.writer.wait()
        work = list(self._snapshots()) if snapshots else []
        if state and self._group is not None:
            work.append(self._shared_state(self._group, elapsed))
        elif state and self.run is not None:
            work.append(self._state(self.run, elapsed))
        ready = _end_of_copies(self.trainer.world.device)

        def write() -> None:
            ready()
            while work:
                work.pop(0)()  # and frees its copies

        self.writer.submit(write)

    def _snapshots(self) -> Iterator[Work]:
        trainer, storage = self.trainer, self.trainer.options.snapshot_storage
        dtype = torch.float16 if storage == "fp16" else None
        buffers = copy_to_cpu(dict(trainer.net.named_buffers()), dtype)
        for sigma_rel, profile in zip(trainer.ema.sigma_rels, trainer.ema.profiles, strict=True):
            parameters = trainer.whole(profile)
            if self.run is not None:
                averages = dict(zip(trainer.names, copy_to_cpu(parameters, dtype), strict=True))
                updates = trainer.nimg // trainer.options.batch
                header = tracked(trainer.net, nimg=trainer.nimg, sigma_rel=sigma_rel, updates=updates, **self.facts)
                path = self.run.path / checkpoint.snapshot_name(trainer.nimg, sigma_rel)
                yield functools.partial(save_tracked, path, header, averages, buffers, storage)

    def _state(self, run: RunDir, elapsed: float) -> Work:
        nimg = self.trainer.nimg
        facts = {"format_version": checkpoint.FORMAT_VERSION, "run": run.name, "elapsed": elapsed}
        state = {**facts, **copy_to_cpu(self.trainer.state_dict())}

        def write() -> None:
            checkpoint.save_state(run.path / checkpoint.state_name(nimg), state)
            self._drop_old_states(run, nimg)

        return write

    def _shared_state(self, group: torch.distributed.ProcessGroup, elapsed: float) -> Work:
        run, nimg = self.run, self.trainer.nimg
        place = [None if run is None else (run.path / checkpoint.state_name(nimg, sharded=True), run.name)]
        torch.distributed.broadcast_object_list(place, src=0)
        path, name = place[0]
        complete = sharded_state.begin_save(path, self.trainer, elapsed, name, group)

        def write() -> None:
            complete()
            if run is not None:
                self._drop_old_states(run, nimg)

        return write

    def _drop_old_states(self, run: RunDir, nimg: int) -> None:
        options = self.trainer.options
        retention.drop_old_states(run.path, run.name, nimg, options.keep, options.keep_every)

    def wait(self) -> None:
        """Return when everything is on the disk."""
        self.writer.wait()

    def close(self) -> None:
        """Wait, and end the thread."""
        self.writer.close()


def copy_to_cpu(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of nested dicts and lists with their tensors, in ``dtype`` if given; those of a GPU are in pinned memory,
    and complete once the stream has come so far."""
    if isinstance(value, Tensor):
        value, pinned = value.detach(), value.is_cuda
        copy = torch.empty_like(value, dtype=dtype or value.dtype, device="cpu", pin_memory=pinned)
        return copy.copy_(value, non_blocking=pinned)
    if isinstance(value, dict):
        return {key: copy_to_cpu(member, dtype) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_cpu(member, dtype) for member in value)
    return value


def _end_of_copies(device: torch.device) -> Work:
    """What waits for the copies queued so far."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
