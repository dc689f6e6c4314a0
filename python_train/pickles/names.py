"""What the name of a file of the reference tells (spec 5.4)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

FILE_NAME = re.compile(r"(.*)-(\d+)-(\d+\.\d+)\.pkl")

TRACKED_SIGMA_RELS = (0.05, 0.10)


def is_official(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name says that it is a pickle of the reference."""
    return Path(path).suffix == ".pkl"


def name_facts(path: Path) -> dict[str, Any]:
    """What a file's name tells (spec 5.4): nimg, sigma_rel (None where it does not) and ema_kind.

    A reconstructed network is named like a tracked one. One with a tracked width is the tracked average, so only other
    widths count as reconstructed.
    """
    match = FILE_NAME.fullmatch(path.name)
    if match is None:
        return {"nimg": None, "sigma_rel": None, "ema_kind": "phema"}
    prefix, kimg, sigma_rel = match[1], int(match[2]), float(match[3])
    tracked = prefix != "phema" and (prefix == "network-snapshot" or sigma_rel in TRACKED_SIGMA_RELS)
    return {"nimg": nimg_of(kimg), "sigma_rel": sigma_rel, "ema_kind": "power" if tracked else "phema"}


def nimg_of(kimg: int) -> int:
    """Images seen at a snapshot that is named by thousands: a multiple of 1024 (spec 5.4)."""
    nimg = (kimg * 1000 + 999) // 1024 * 1024
    return nimg if nimg // 1000 == kimg else kimg * 1000
