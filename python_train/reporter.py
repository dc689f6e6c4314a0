"""Status of a run (spec 4.8, item 1): a line, statistics, warnings; pictures; all of it for the sinks too."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from pathlib import Path

import torch

from python_train import data, magnitudes, noise_levels
from python_train.pictures import save_png
from python_train.probe import Probe
from python_train.run_dir import RunDir
from python_train.sample_grids import SampleGrids
from python_train.sinks import open_sinks
from python_train.trainer import Trainer


class Reporter:
    """Status lines and statistics (spec 4.8, item 1). Time outside the optimizer steps is maintenance."""

    def __init__(
        self,
        trainer: Trainer,
        dataset: data.Dataset,
        encoder: data.Encoder,
        run: RunDir | None,
        grids: SampleGrids | None,
        elapsed: float,
    ) -> None:
        options = trainer.options
        levels = noise_levels.training_levels(options.P_mean, options.P_std)
        self.trainer = trainer
        self.probe = Probe(dataset, encoder, trainer.world.device, levels)
        self.grids = grids
        self.sinks = open_sinks(options, run.path, trainer.nimg) if run is not None else ()
        self.drifting: set[str] = set()
        self.run = run
        self.before = elapsed
        self.start = self.tick_start = self.maintenance_start = time.monotonic()
        self.maintenance = 0.0
        self.tick_nimg = trainer.nimg
        self.nonfinite_reported = trainer.nonfinite()

    def close(self) -> None:
        """Complete what the sinks have been given."""
        for sink in self.sinks:
            sink.close()

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.start

    def start_maintenance(self) -> None:
        self.maintenance_start = time.monotonic()

    def stop_maintenance(self) -> None:
        self.maintenance += time.monotonic() - self.maintenance_start

    def status(self, draw: bool) -> float:
        """Report what happened since the last call, with pictures if ``draw``; returns the mean loss. All processes
        call this."""
        trainer, now = self.trainer, time.monotonic()
        loss = trainer.mean_loss()
        nonfinite = trainer.nonfinite()
        sec_per_tick = now - self.tick_start
        nimg = trainer.nimg
        stats = {
            "Loss/loss": loss,
            "Loss/learning_rate": trainer.lr,
            "Progress/kimg": nimg / 1000,
            "Timing/total_sec": self.elapsed(),
            "Timing/sec_per_tick": sec_per_tick,
            "Timing/sec_per_kimg": sec_per_tick / (nimg - self.tick_nimg) * 1000 if nimg > self.tick_nimg else math.nan,
            "Timing/maintenance_sec": self.maintenance,
            "Resources/cpu_mem_gb": _resident_bytes() / 2**30,
            "Resources/peak_gpu_mem_gb": 0.0,
            "Resources/peak_gpu_mem_reserved_gb": 0.0,
            "Loss/nonfinite_gradients": sum(nonfinite.values()),
            "timestamp": time.time(),
        }
        if trainer.world.device.type == "cuda":
            stats["Resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 2**30
            stats["Resources/peak_gpu_mem_reserved_gb"] = torch.cuda.max_memory_reserved() / 2**30
            torch.cuda.reset_peak_memory_stats()
        net = trainer.whole_net()
        metrics, grids = self.grids.draw(trainer) if self.grids is not None and draw else ({}, {})
        if self.run is not None:
            buckets, errors = self.probe.measure(net)
            stats["Loss/effective_learning_rate"] = trainer.lr / magnitudes.mean_weight(buckets)
            stats |= magnitudes.as_stats(buckets) | noise_levels.as_stats(errors) | metrics
            self.run.log(_status_line(stats))
            self._warn(buckets, nonfinite)
            for sigma_rel, grid in grids.items():
                save_png(self.run.path / f"samples-{nimg // 1000:07d}-{sigma_rel}.png", grid)
            self.run.append_stats({key: float(_format(key, value)) for key, value in stats.items()})
            shown = {key: value for key, value in stats.items() if "/" in key}  # sinks have clocks of their own
            for sink in self.sinks:
                sink.write(nimg, shown, {f"Samples/{sigma_rel}": grid for sigma_rel, grid in grids.items()})
        self.nonfinite_reported = nonfinite
        self.tick_start, self.tick_nimg = now, nimg
        self.maintenance, self.maintenance_start = 0.0, now
        return loss

    def _warn(self, buckets: list[magnitudes.Bucket], nonfinite: dict[str, int]) -> None:
        """Say once what magnitudes are wrong, and each time which gradients were."""
        drifting = magnitudes.drifting(buckets) if self.trainer.nimg else {}  # new weights are not normalised yet
        for layer, text in drifting.items():
            if layer not in self.drifting:
                self.run.log(f"WARNING: {text}")
        self.drifting = set(drifting)
        new = {name: n - self.nonfinite_reported.get(name, 0) for name, n in nonfinite.items()}
        where = [f"{name} ({n})" for name, n in new.items() if n]
        if where:
            others = f" and {len(where) - 3} other parameters" if len(where) > 3 else ""
            self.run.log(
                f"WARNING: gradient values that were not finite since {self.tick_nimg:,} images, counted as 0: "
                f"{', '.join(where[:3])}{others}"
            )


def _format(key: str, value: float) -> str:
    return f"{value:.3f}" if key in ("Progress/kimg", "timestamp") else f"{value:g}"


def _status_line(stats: dict[str, float]) -> str:
    seconds = round(stats["Timing/total_sec"])
    duration = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return (
        f"kimg {stats['Progress/kimg']:<9.1f} loss {stats['Loss/loss']:<8.4f} lr {stats['Loss/learning_rate']:<9.3g} "
        f"time {duration:<10} sec/tick {stats['Timing/sec_per_tick']:<7.1f} "
        f"sec/kimg {stats['Timing/sec_per_kimg']:<8.3g} maintenance {stats['Timing/maintenance_sec']:<6.1f} "
        f"cpumem {stats['Resources/cpu_mem_gb']:<6.2f} gpumem {stats['Resources/peak_gpu_mem_gb']:<6.2f} "
        f"reserved {stats['Resources/peak_gpu_mem_reserved_gb']:.2f}"
    )


def _resident_bytes() -> int:
    """Memory this process occupies now (where /proc exists) or at most so far."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
