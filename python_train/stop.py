"""Stopping early: a signal, or data that cannot be read, lets the training state be saved, then ends the program."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import torch

from python_train.signals import SIGNALS
from python_train.world import World


class Stopped(Exception):
    """A run ended early because it was asked to; its training state is saved."""


class StopRequest:
    """While active, the first of `SIGNALS` is remembered instead of ending the process; the second does what it did.

    Outside of the main thread signals are left alone. ``error`` is set where this process cannot go on. ``group`` is
    that of all processes by way of their CPUs, None for a world of one.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: str | None = None
        self.error: Exception | None = None
        self._before: dict[int, object] = {}
        self.group = torch.distributed.new_group(backend="gloo") if world.size > 1 else None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self) -> bool:
        """Whether any process was asked to stop, or cannot go on; every process must call this, and gets the same
        answer."""
        here = self.signal is not None or self.error is not None
        if self.group is None:
            return here
        asked = torch.tensor([here], dtype=torch.int32)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(asked)
