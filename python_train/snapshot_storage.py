"""How finely a run stores its averages: float16 as published, float32, or float16 with eight more bits beside it.

Short EMA lengths are differences of stored averages, which amplify the rounding of float16 tens of times (spec 5.4).
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from edm2ext.phema import save_average
from python_train import checkpoint
from python_train.checkpoint import stream_snapshot
from python_train.network import Precond

# Of files without a checksum of their own, which are written at several places at once.
FORMAT_VERSION = 1


def tracked(
    net: Precond, *, nimg: int, sigma_rel: float, updates: int, dataset: dict[str, Any], encoder: dict[str, Any]
) -> dict[str, Any]:
    """The header of a snapshot of an average that was tracked in training, by so many updates."""
    facts = {"nimg": nimg, "sigma_rel": sigma_rel, "ema_kind": "power", "updates": updates}
    facts |= {"dataset": dataset, "encoder": encoder}
    return {"format_version": checkpoint.FORMAT_VERSION, "config": net.config, **facts}


def save_tracked(
    path: str | os.PathLike[str], header: dict[str, Any], averages: dict[str, Tensor], buffers: dict[str, Tensor],
    storage: str,
) -> None:  # fmt: skip
    """Write an average, and the network's buffers, by name, in one of `edm2ext.phema.STORAGES`. The network itself is
    not touched: it may be training."""
    tensors = {**averages, **buffers}
    if storage == "fp16":
        stream_snapshot(path, header, {name: tensor.shape for name, tensor in tensors.items()}, tensors.values())
    else:
        save_average(path, tensors, header, storage, copied=buffers)
