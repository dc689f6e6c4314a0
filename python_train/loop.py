"""The training loop (spec 4.6, 4.8): the cadence around the optimizer steps, and resuming where a run stopped."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import tqdm
from torch import Tensor

from edm2ext import tune
from python_train import UserError, checkpoint, data, graph, initial, plan, rng, sharded_state, sinks
from python_train.config import TrainOptions
from python_train.network import Precond
from python_train.reporter import Reporter
from python_train.run_dir import RunDir
from python_train.sample_grids import SampleGrids
from python_train.saving import Saver
from python_train.stop import Stopped, StopRequest
from python_train.trainer import Trainer
from python_train.versions import versions
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
        "versions": versions(world.device),
    }


def stop_point(options: TrainOptions, start: int) -> int:
    """Where this process stops: the duration, or the last checkpoint within the slice (spec 4.8)."""
    if not options.slice:
        return options.duration
    interval = options.checkpoint or options.snapshot or options.batch
    stop = (start + options.slice) // interval * interval
    if stop <= start:
        name = "checkpoint" if options.checkpoint else "snapshot"
        raise UserError(f"slice {options.slice} is shorter than the {name} interval {interval}: no progress")
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
    graph.check(options, world)
    rng.reseed(options.seed, world.rank)
    encoder = dataset.encoder()
    channels = network_channels(dataset, encoder, world.device)
    net = build_network(options, dataset.resolution, channels, dataset.label_dim)
    dataset.require_divisible(net.unet.stride)
    stop_point(options, 0)
    if options.wandb is not None:
        sinks.import_wandb()
    grids = SampleGrids(options, dataset, encoder, world.device) if options.sample else None
    notes = _start_from(options, net, Path(outdir))
    dataset.preload(progress and world.rank == 0)
    description = describe(options, dataset, encoder, net, world)
    run = world.first(lambda: RunDir(Path(outdir), description, override))  # from here on files are written
    try:
        for note in notes if run is not None else ():
            run.log(note)
        with StopRequest(world) as request:
            return _train(options, world, dataset, encoder, net, run, grids, request, progress)
    finally:
        if run is not None:
            run.close()


def _start_from(options: TrainOptions, net: Precond, outdir: Path) -> list[str]:
    """Give the network of a new run the weights of ``options.init_from``; returns what to say about it."""
    resumes = outdir.is_dir() and checkpoint.list_states(outdir)
    if options.init_from is None or resumes:
        return []
    return initial.load_weights(net, Path(options.init_from), options.reinit)


def _train(
    options: TrainOptions,
    world: World,
    dataset: data.Dataset,
    encoder: data.Encoder,
    net: Precond,
    run: RunDir | None,
    grids: SampleGrids | None,
    request: StopRequest,
    progress: bool,
) -> int:
    trainer = Trainer(net.to(world.device), options, encoder, world)
    elapsed = _resume(trainer, run, world, request.group)
    first, stop = trainer.nimg, stop_point(options, trainer.nimg)
    if run is not None:
        if run.changed:
            run.log(f"options have changed, so the run will not be, bit for bit, what either would have made of it: "
                    f"{'; '.join(run.changed)}")  # fmt: skip
        run.write_options()
        run.trim_stats(first)
        run.log(f"training from {first:,} to {stop:,} images" if first < stop else f"complete at {first:,} images")
    if first >= stop:
        return first

    if world.device.type == "cuda" and options.precision != "fp32" and tune.available():
        sizes = (dataset.resolution, net.img_channels, dataset.label_dim)
        tune.tune(plan.convolutions(options, *sizes, trainer.micro_batch, dataset.shape[1:]))
    indices = data.IndexStream(dataset.num_images, options.seed, first, world.rank, world.size)
    batches = data.batches(dataset, trainer.micro_batch, indices, world.device)
    report = Reporter(trainer, dataset, encoder, run, grids, elapsed)
    step = graph.stepper(trainer)
    if run is not None and options.cuda_graph and trainer.shards is not None:
        run.log("FSDP runs eagerly: no CUDA graph is captured")
    saver = Saver(trainer, run, dataset.facts(), encoder.facts())
    bar = tqdm.tqdm(
        total=stop,
        initial=first,
        unit="img",
        unit_scale=True,
        desc="training",
        disable=not progress or world.rank > 0,
        mininterval=0.1 if sys.stderr.isatty() else 5.0,  # in a file each refresh is a line
    )
    with bar, contextlib.closing(report), contextlib.closing(saver):
        while True:
            nimg = trainer.nimg
            drawn = _draw(batches, trainer.rounds, request) if nimg < stop else []
            done, resumed_here = nimg >= stop, nimg == first and first > 0
            draw = _due(nimg, options.sample, done) and not resumed_here
            if draw or (_due(nimg, options.status, done) and not resumed_here):
                loss = report.status(draw)
                if math.isfinite(loss):
                    bar.set_postfix(loss=f"{loss:.4f}")
            asked = not done and request.agreed()
            to_go_on = asked or (done and nimg < options.duration)
            state_due = (to_go_on or _due(nimg, options.checkpoint, done)) and nimg != first
            if state_due:
                world.check_equal(net)
                trainer.share_losses()
            saver.save(_due(nimg, options.snapshot) and not resumed_here, state_due, report.elapsed())
            if done or asked:
                saver.wait()
            if done:
                return nimg
            if asked:
                _stop(request, nimg)
            report.stop_maintenance()
            step(iter(drawn))
            report.start_maintenance()
            bar.update(options.batch)


def _draw(batches: Iterator[tuple[Tensor, Tensor]], rounds: int, request: StopRequest) -> list[tuple[Tensor, Tensor]]:
    """What the next step needs, before it begins: where data cannot be read, the state before the step can be saved."""
    try:
        return list(itertools.islice(batches, rounds))
    except (UserError, OSError, RuntimeError) as error:
        request.error = error
        return []


def _stop(request: StopRequest, nimg: int) -> NoReturn:
    """End a run whose state is saved."""
    if request.error is not None:
        saved = f"The run stops at {nimg:,} images; they are saved." if nimg else "The run has not begun."
        raise UserError(f"{request.error}\n{saved}") from request.error
    raise Stopped(f"asked to stop ({request.signal or 'another process'}): {nimg:,} images are done and saved")


def _due(nimg: int, interval: int, done: bool = False) -> bool:
    return interval > 0 and (done or nimg % interval == 0)


def _resume(trainer: Trainer, run: RunDir | None, world: World, group: torch.distributed.ProcessGroup | None) -> float:
    """Load the run's latest training state on every process; returns the time it had taken. It is passed on by a group
    of CPUs: a GPU might have no room for it."""
    state = [world.first(lambda: run.latest_state())]
    if world.size > 1:
        torch.distributed.broadcast_object_list(state, src=0, group=group)
    if state[0] is None:
        return 0.0
    try:
        if "folder" in state[0]:
            return sharded_state.load(Path(state[0]["folder"]), trainer)
        trainer.load_state_dict(state[0])
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        first, *others = str(error).splitlines()
        text = " ".join([first, *map(str.strip, others[:1]), *([f"and {len(others) - 1} more"] if others[1:] else [])])
        raise UserError(
            f"the training state does not fit this network ({text}); choose another --outdir, where a new run may "
            "start from a snapshot of this one (--init-from)"
        ) from error
    return state[0]["elapsed"]
