"""The training program built on :mod:`edm2ext`: network, loss, data, training loop, sampling and reporting."""

from __future__ import annotations

import os

# How long an OpenMP thread spins for its next piece of work before it sleeps; read when torch is imported, which is
# after this. GNU's default of milliseconds is fastest on idle cores, but where another program wants one of them every
# piece waits for a time slice: a training step on two cores took 3.7 s instead of 0.5 s then (0.14 against 0.16 s on
# idle ones).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class UserError(ValueError):
    """Something the person running a command can put right: the commands print its message without a traceback."""
