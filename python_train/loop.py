"""The training loop (spec 4.6, 4.8): the cadence around the optimizer steps, and resuming where a run stopped."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import tqdm

from python_train import UserError, checkpoint, data, graph, magnitudes, rng, sharded_state
from python_train.config import TrainOptions
from python_train.network import Precond
from python_train.run_dir import RunDir
from python_train.snapshot_storage import save_tracked
from python_train.stop import Stopped, StopRequest
from python_train.trainer import Trainer
from python_train.world import World


def describe(
    options: TrainOptions, dataset: data.Dataset, encoder: data.Encoder, net: Precond, world: World
) -> dict[str, Any]:
    """What identifies a run: the content of options.json, compared when it is resumed."""
    return {
        "format_version": checkpoint.FORMAT_VERSION,
        "options": options.to_json(),
        "dataset": dataset.facts(),
        "encoder": encoder.facts(),
        "network": net.config,
        "processes": world.size,
    }


def stop_point(options: TrainOptions, start: int) -> int:
    """Where this process stops: the duration, or the last checkpoint within the slice (spec 4.8)."""
    if not options.slice:
        return options.duration
    interval = options.checkpoint or options.snapshot or options.batch
    stop = (start + options.slice) // interval * interval
    if stop <= start:
        raise UserError(f"slice {options.slice} is shorter than the checkpoint interval {interval}: no progress")
    return min(stop, options.duration)


def network_channels(dataset: data.Dataset, encoder: data.Encoder, device: torch.device | str = "cpu") -> int:
    """Channels that the network sees, found by encoding the first image (which draws random numbers for latents)."""
    return encoder.encode(torch.from_numpy(dataset.read(0))[None].to(device)).shape[1]


def build_network(options: TrainOptions, resolution: int, channels: int, label_dim: int) -> Precond:
    """The network for data of this shape. Raises UserError if they do not fit."""
    try:
        return Precond(**options.network_config(resolution, channels, label_dim))
    except ValueError as error:
        raise UserError(f"the network does not fit the data: {error}") from error


def train(
    options: TrainOptions,
    dataset: data.Dataset,
    outdir: str | os.PathLike[str],
    world: World | None = None,
    override: bool = False,
    progress: bool = False,
) -> int:
    """Train, or continue training, the run in ``outdir`` (spec 4.6, 4.8). Returns the number of images it has seen.

    Raises UserError for whatever the person starting it can put right, OSError when files cannot be written, and
    Stopped after a signal (see `python_train.stop`).
    """
    world = world or World()
    options.validate(world.size)
    rng.reseed(options.seed, world.rank)
    encoder = dataset.encoder()
    channels = network_channels(dataset, encoder, world.device)
    net = build_network(options, dataset.resolution, channels, dataset.label_dim)
    dataset.require_divisible(net.unet.stride)
    stop_point(options, 0)
    dataset.preload(progress and world.rank == 0)
    run = None
    if world.rank == 0:  # from here on files are written
        run = RunDir(Path(outdir), describe(options, dataset, encoder, net, world), override)
    try:
        with StopRequest(world) as request:
            return _train(options, world, dataset, encoder, net, run, request, progress)
    finally:
        if run is not None:
            run.close()


def _train(
    options: TrainOptions,
    world: World,
    dataset: data.Dataset,
    encoder: data.Encoder,
    net: Precond,
    run: RunDir | None,
    request: StopRequest,
    progress: bool,
) -> int:
    trainer = Trainer(net.to(world.device), options, encoder, world)
    elapsed = _resume(trainer, run, world)
    first, stop = trainer.nimg, stop_point(options, trainer.nimg)
    if run is not None:
        run.write_options()
        run.trim_stats(first)
        run.log(f"training from {first:,} to {stop:,} images" if first < stop else f"complete at {first:,} images")
    if first >= stop:
        return first

    indices = data.IndexStream(dataset.num_images, options.seed, first, world.rank, world.size)
    batches = data.batches(dataset, trainer.micro_batch, indices, world.device)
    report = _Reporter(trainer, run, world, elapsed, magnitudes.Probe(dataset, encoder, world.device))
    step = graph.stepper(trainer)
    bar = tqdm.tqdm(
        total=stop,
        initial=first,
        unit="img",
        unit_scale=True,
        desc="training",
        disable=not progress or world.rank > 0,
        mininterval=0.1 if sys.stderr.isatty() else 5.0,  # in a file each refresh is a line
    )
    with bar:
        while True:
            nimg = trainer.nimg
            done, resumed_here = nimg >= stop, nimg == first and first > 0
            if _due(nimg, options.status, done) and not resumed_here:
                loss = report.status()
                if math.isfinite(loss):
                    bar.set_postfix(loss=f"{loss:.4f}")
            if _due(nimg, options.snapshot) and not resumed_here:
                _save_snapshots(trainer, run, dataset, encoder)
            asked = not done and request.agreed()
            if (asked or _due(nimg, options.checkpoint, done)) and nimg != first:
                world.check_equal(net)
                _save_state(trainer, run, world, report.elapsed())
            if done:
                return nimg
            if asked:
                raise Stopped(
                    f"asked to stop ({request.signal or 'another process'}): {nimg:,} images are done and saved"
                )
            report.stop_maintenance()
            step(batches)
            report.start_maintenance()
            bar.update(options.batch)


def _due(nimg: int, interval: int, done: bool = False) -> bool:
    return interval > 0 and (done or nimg % interval == 0)


def _resume(trainer: Trainer, run: RunDir | None, world: World) -> float:
    """Load the run's latest training state on every process; returns the time it had taken."""
    state = [run.latest_state() if run is not None else None]
    if world.size > 1:
        torch.distributed.broadcast_object_list(state, src=0)
    if state[0] is None:
        return 0.0
    try:
        if "folder" in state[0]:
            return sharded_state.load(Path(state[0]["folder"]), trainer)
        trainer.load_state_dict(state[0])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"the training state does not fit this network ({error}); choose another --outdir") from error
    return state[0]["elapsed"]


def _save_snapshots(trainer: Trainer, run: RunDir | None, dataset: data.Dataset, encoder: data.Encoder) -> None:
    """One file for each tracked average (spec 5.3)."""
    for sigma_rel, profile in zip(trainer.ema.sigma_rels, trainer.ema.profiles, strict=True):
        parameters = trainer.whole(profile)
        if run is not None:
            save_tracked(
                run.path / checkpoint.snapshot_name(trainer.nimg, sigma_rel),
                trainer.net,
                trainer.options.snapshot_storage,
                nimg=trainer.nimg,
                sigma_rel=sigma_rel,
                dataset=dataset.facts(),
                encoder=encoder.facts(),
                parameters=parameters,
            )


def _save_state(trainer: Trainer, run: RunDir | None, world: World, elapsed: float) -> None:
    if trainer.shards is not None:
        path = [None if run is None else run.path / checkpoint.state_name(trainer.nimg, sharded=True)]
        torch.distributed.broadcast_object_list(path, src=0)
        sharded_state.save(path[0], trainer, elapsed)
    elif run is not None:
        state = {"format_version": checkpoint.FORMAT_VERSION, "elapsed": elapsed, **trainer.state_dict()}
        checkpoint.save_state(run.path / checkpoint.state_name(trainer.nimg), state)
    if run is not None:
        run.drop_old_states()


class _Reporter:
    """Status lines and statistics (spec 4.8, item 1). Time outside the optimizer steps is maintenance."""

    def __init__(
        self, trainer: Trainer, run: RunDir | None, world: World, elapsed: float, probe: magnitudes.Probe
    ) -> None:
        self.trainer = trainer
        self.probe = probe
        self.drifting: set[str] = set()
        self.run = run
        self.world = world
        self.before = elapsed
        self.start = self.tick_start = self.maintenance_start = time.monotonic()
        self.maintenance = 0.0
        self.tick_nimg = trainer.nimg
        self.nonfinite_reported = trainer.nonfinite()

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.start

    def start_maintenance(self) -> None:
        self.maintenance_start = time.monotonic()

    def stop_maintenance(self) -> None:
        self.maintenance += time.monotonic() - self.maintenance_start

    def status(self) -> float:
        """Report what happened since the last call; returns the mean loss."""
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
        if self.world.device.type == "cuda":
            stats["Resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 2**30
            stats["Resources/peak_gpu_mem_reserved_gb"] = torch.cuda.max_memory_reserved() / 2**30
            torch.cuda.reset_peak_memory_stats()
        net = trainer.whole_net()
        if self.run is not None:
            buckets = self.probe.measure(net)
            stats |= magnitudes.as_stats(buckets)
            self.run.log(_status_line(stats))
            drifting = magnitudes.drifting(buckets) if nimg else {}  # new weights are not normalised yet
            for layer in drifting.keys() - self.drifting:
                self.run.log(f"WARNING: {drifting[layer]}")
            self.drifting = set(drifting)
            new = {name: n - self.nonfinite_reported.get(name, 0) for name, n in nonfinite.items()}
            where = [f"{name} ({n})" for name, n in new.items() if n]
            if where:
                others = f" and {len(where) - 3} other parameters" if len(where) > 3 else ""
                self.run.log(
                    f"WARNING: gradient values that were not finite since {self.tick_nimg:,} images, counted as 0: "
                    f"{', '.join(where[:3])}{others}"
                )
            self.run.append_stats({key: float(_format(key, value)) for key, value in stats.items()})
        self.nonfinite_reported = nonfinite
        self.tick_start, self.tick_nimg = now, nimg
        self.maintenance, self.maintenance_start = 0.0, now
        return loss


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
