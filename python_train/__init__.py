"""The training program built on :mod:`edm2ext`: network, loss, data, training loop, sampling and reporting."""

from __future__ import annotations


class UserError(ValueError):
    """Something the person running a command can put right: the commands print its message without a traceback."""
