"""Networks with any EMA length, in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from edm2ext import phema
from python_train.checkpoint import save_snapshot
from python_train.network import Precond
from python_train.reconstruct.snapshots import Snapshot, open_snapshots, target_time


@dataclass(frozen=True)
class Reconstruction:
    """A network with a new EMA length; its weights are the float16 values that a snapshot stores, held in float32."""

    net: Precond
    nimg: int
    sigma_rel: float
    dataset: dict[str, Any]
    encoder: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Store it as a snapshot of kind "phema", atomically."""
        save_snapshot(
            path,
            self.net,
            nimg=self.nimg,
            sigma_rel=self.sigma_rel,
            ema_kind="phema",
            dataset=self.dataset,
            encoder=self.encoder,
            extra=self.extra,
        )


def reconstruct(
    snapshots: Sequence[Snapshot],
    out_std: Sequence[float],
    out_nimg: int | None = None,
    *,
    batch: int = 8,
    groups: Mapping[str, float] | None = None,
    show_progress: bool = False,
) -> Iterator[Reconstruction]:
    """Yield, for each width in out_std, the network averaged over training with that profile (spec 5.4).

    Args:
        snapshots: stored averages of one run; those at 0 images or after the target time are not used.
        out_std: widths sigma_rel wanted, each in (0, 0.2887).
        out_nimg: time to reconstruct for; must be one of the inputs'. None = the latest.
        batch: networks held in memory together; every input is read once per batch. The command writes any number of
            them in one pass (`edm2ext.phema.Reconstruction.to_files`).
        groups: other widths for parameters whose names match a pattern, see `edm2ext.phema.Reconstruction`.
        show_progress: draw a progress bar over the parameters of all batches.

    Sums are in float32 of float16 weights; buffers are the last input's. Raises UserError for inputs that are missing,
    unreadable or not of one run, and for a time without snapshot; ValueError for widths out of range.
    """
    nimg = target_time(snapshots, out_nimg)
    averages = open_snapshots([s for s in snapshots if 0 < s.nimg <= nimg])
    header = averages[0].header
    extra = {"license": header["license"]} if "license" in header else {}
    extra |= {"sigma_rel_of": dict(groups)} if groups else {}
    batches = [out_std[start : start + batch] for start in range(0, len(out_std), batch)]
    with tqdm(unit_scale=True, unit=" parameters", desc="averaging", disable=not show_progress) as progress:
        for number, widths in enumerate(batches):
            work = phema.Reconstruction(averages, [phema.Target(width, nimg) for width in widths], groups)
            numel = work.combination.numel
            progress.total = numel * len(batches)

            def written(position: int, done: int = number * numel) -> None:
                progress.update(done + position - progress.n)

            for sigma_rel, state in zip(widths, work.in_memory(progress=written), strict=True):
                with torch.device("meta"):
                    net = Precond(**header["config"])
                net.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
                net.eval().requires_grad_(False)
                yield Reconstruction(net, nimg, sigma_rel, header["dataset"], header["encoder"], extra)
