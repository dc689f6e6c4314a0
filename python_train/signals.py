"""The signals that end a run, from its very start: this module imports nothing that takes time."""

from __future__ import annotations

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STOPPED = 75  # sysexits' EX_TEMPFAIL: nothing is wrong, the same command continues


def end_at_once() -> None:
    """Until something else handles them, `SIGNALS` end this process with `EXIT_STOPPED`, with nothing saved.

    Processes that it forks end as if this had not been called.
    """
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        os.write(2, f"asked to stop ({name}), ended at once; the same command continues\n".encode())
        os._exit(EXIT_STOPPED)

    for number in SIGNALS:
        signal.signal(number, end)
