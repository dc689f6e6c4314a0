"""The smallest files of the reference program, for tests of how files are read and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import official_files as files
import torch
from official_files import (
    Items,
    Mention,
    PersistentId,
    easy_dict,
    ordered_dict,
    small_net,
    write,
)

from python_train import UserError
from python_train.network import Precond
from python_train.official import read_official, read_snapshot

NAME = "edm2-tiny-0000065-0.050.pkl"


def import_everything(folder: Path) -> None:
    """What torch and zipfile import when they are first used is not what a file had imported."""
    read_snapshot(write(folder / NAME, files.snapshot(tiny_net())))
    state = files.training_state({0.05: small_net(model_channels=64, channels_per_head=64)})
    read_official(write(folder / "state.pt", state))
    outline = files.zip_file(files.dumps(minimal_state(), protocol=2), {"0": bytes(16)})
    assert reason(lambda: read_official(write(folder / "outline.pt", outline)))


def tiny_net(**overrides: Any) -> Precond:
    """As small as a network can be: its file is mostly structure."""
    arguments = {"model_channels": 4, "channel_mult": [1], "attn_resolutions": [], "channels_per_head": 4}
    return small_net(**{**arguments, "logvar_channels": 4, **overrides})


def minimal_state(count: int = 4, **replaced: Any) -> Items:
    """The outline of a training state with one tensor in it."""
    storage = PersistentId(("storage", Mention(("torch", "FloatStorage")), "0", "cpu", count))
    tensor = files.tensor(storage, torch.zeros(2, 2))
    parts = {"state": easy_dict({"cur_nimg": 1}), "ema": {"stds": [0.05], "emas": [ordered_dict({"x": tensor})]}}
    return easy_dict({**parts, **replaced})


def reason(read: Callable[[], object]) -> str | None:
    try:
        read()
    except UserError as error:
        return str(error)
    return None
