"""How finely a run stores its averages: float16 as published, float32, or float16 with eight more bits beside it.

Short EMA lengths are differences of stored averages, which amplify the rounding of float16 tens of times (spec 5.4).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from edm2ext.phema import save_average
from python_train.checkpoint import save_snapshot
from python_train.network import Precond

# Of the format without checksums, which is good for files that are written at several places at once, too.
FORMAT_VERSION = 1


def save_tracked(
    path: str | os.PathLike[str],
    net: Precond,
    storage: str,
    *,
    nimg: int,
    sigma_rel: float,
    dataset: dict[str, Any],
    encoder: dict[str, Any],
    parameters: Sequence[Tensor],
) -> None:
    """Write one tracked average of a network in one of `edm2ext.phema.STORAGES`."""
    facts = {"nimg": nimg, "sigma_rel": sigma_rel, "ema_kind": "power", "dataset": dataset, "encoder": encoder}
    if storage == "fp16":
        save_snapshot(path, net, **facts, parameters=parameters)
        return
    names = [name for name, _ in net.named_parameters()]
    buffers = {name: value for name, value in net.state_dict().items() if name not in set(names)}
    tensors = {**dict(zip(names, parameters, strict=True)), **buffers}
    header = {"format_version": FORMAT_VERSION, "config": net.config, **facts}
    save_average(path, tensors, header, storage, copied=buffers)
