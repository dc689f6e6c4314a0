"""Any EMA length after training (spec 5.4): ``python -m python_train.reconstruct``, and the same in Python.

`snapshots` finds and opens a run's stored averages; `networks` makes networks in memory; `command`, `plan` and `search`
are the commands, a file each. The sums themselves are in `edm2ext.phema`, for models of any kind.
"""

from python_train.reconstruct.command import main, warnings_of
from python_train.reconstruct.networks import Reconstruction, reconstruct
from python_train.reconstruct.snapshots import Snapshot, find_snapshots, target_time

__all__ = ["Reconstruction", "Snapshot", "find_snapshots", "main", "reconstruct", "target_time", "warnings_of"]
