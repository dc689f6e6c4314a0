"""The training loop (spec section 4): one optimizer step, the cadence around it, and resuming where a run stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import importlib
import inspect
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tqdm
from torch import Tensor

from edm2ext.optim import FusedAdam
from edm2ext.phema import PowerEMA
from python_train import UserError, checkpoint, config, data, rng
from python_train.config import TrainOptions
from python_train.loss import EDM2Loss
from python_train.network import Precond

COMPUTE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STATES_KEPT = 3


# ------------------------------------------------------------------------------------------------------------ processes


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those of a data-parallel run; a run without torchrun is a world of one."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        if self.size > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values.cpu()

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def check_equal(self, net: torch.nn.Module) -> None:
        """Raise RuntimeError, naming the tensor, where this process's parameters or buffers differ from rank 0's."""
        if self.size == 1:
            return
        for name, value in net.state_dict().items():
            first = value.clone()
            torch.distributed.broadcast(first, src=0)
            if not torch.equal(first.nan_to_num(), value.nan_to_num()):
                raise RuntimeError(f"rank {self.rank}: {name} differs from rank 0's; the processes have diverged")


@contextlib.contextmanager
def open_world(device: str | None = None) -> Iterator[World]:
    """Join the processes that torchrun started (environment WORLD_SIZE, RANK, LOCAL_RANK), or be alone.

    ``device`` None means a GPU if there is one. Communicates by nccl between GPUs and gloo between CPUs.
    Raises UserError if the device does not exist.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {kind!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if size == 1:
        yield World(device=chosen)
        return
    # DDP imports this. After init_process_group the import would hold the group until the interpreter ends, whose
    # end its threads do not always survive: "terminate called without an active exception".
    importlib.import_module("torch._dynamo")
    torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        gc.collect()  # what is left of DDP holds the group too
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- optimizer step


def learning_rate(nimg: int, batch: int, lr: float, decay: float, rampup: float) -> float:
    """alpha(nimg) of spec 4.3 (EDM2 paper Eq. 67); nimg counts the images before the step, rampup is in images."""
    if decay > 0:
        lr /= math.sqrt(max(nimg / (decay * batch), 1))
    if rampup > 0:
        lr *= min(nimg / rampup, 1)
    return lr


class _Raw(torch.nn.Module):
    """`Precond.raw` as the forward of a module, which is what DistributedDataParallel wraps."""

    def __init__(self, net: Precond) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.net.raw(x, sigma, class_labels)


class Trainer:
    """A network with what one optimizer step needs: loss, encoder, Adam, power EMAs, and counters of the reports.

    The network is trained in place. ``nimg`` is the number of images seen so far. Gradients are accumulated and reduced
    as those of effective weights; the optimizer's pass makes those of the weights and gains of them, once a step (spec
    2.6). Weights are force-normalised by the weight pass before every forward, or with ``options.force_normalize``
    "step" by the optimizer's pass, which then makes the next forward's effective weights as well.
    """

    def __init__(
        self,
        net: Precond,
        options: TrainOptions,
        encoder: data.Encoder | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world or World(device=next(net.parameters()).device)
        self.options = options
        self.micro_batch, self.rounds = options.rounds(self.world.size)
        self.encoder = encoder or data.PixelEncoder()
        self.net = net.train().requires_grad_(True)
        self.net.compute_dtype = COMPUTE_DTYPES[options.precision]
        self.names = [name for name, _ in net.named_parameters()]
        self.params = list(net.parameters())
        self.prepared = net.prepared_weights(gradients="effective")
        for gain in self.prepared.gain_of.values():
            gain.requires_grad_(False)  # the optimizer makes its gradient of its weight's
        self.loss = EDM2Loss(options.P_mean, options.P_std, net.sigma_data)
        self.raw: torch.nn.Module = _Raw(net)
        if self.world.size > 1:
            for buffer in net.buffers():
                torch.distributed.broadcast(buffer, src=0)  # once; DDP would do it in every forward
            devices = [self.world.device] if self.world.device.type == "cuda" else None
            ddp = torch.nn.parallel.DistributedDataParallel
            renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # since torch 2.13
            no_sync = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            self.raw = ddp(self.raw, device_ids=devices, **no_sync)
        self.ema = PowerEMA(self.params, options.sigma_rels)
        self.normalize_in_step = options.force_normalize == "step"
        self.prepared.refresh(force=self.normalize_in_step)
        self.optimizer = FusedAdam(
            net,
            options.lr,
            betas=(0.9, 0.99),
            eps=1e-8,
            gains=self.prepared.gain_of,
            gradients="effective",
            ema=self.ema,
            force_normalize=self.normalize_in_step,
            prepared=self.prepared.effective_of if self.normalize_in_step else None,
        )
        self.nimg = 0
        self.lr = 0.0
        self.loss_sum = torch.zeros([2], dtype=torch.float64, device=self.world.device)

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step over ``options.batch`` images (spec 4.8, item 4)."""
        options = self.options
        rng.reseed(options.seed, self.world.rank, self.nimg)
        for round_index in range(self.rounds):
            last = round_index == self.rounds - 1
            with contextlib.nullcontext() if last or self.world.size == 1 else self.raw.no_sync():
                self._accumulate(*next(batches))
        self.lr = learning_rate(self.nimg, options.batch, options.lr, options.decay, options.rampup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.nimg += options.batch
        self.optimizer.step(self.ema.weights(self.nimg, options.batch))
        self.optimizer.zero_grad(set_to_none=True)

    def _accumulate(self, stored: Tensor, labels: Tensor) -> None:
        """Add the gradient of one micro-batch (spec 4.1)."""
        if not self.normalize_in_step:
            self.prepared.refresh(force=True)
        with self.prepared:
            scale = self.options.loss_scaling / (self.micro_batch * self.rounds)
            mean = self.loss.backward(self.raw, self.encoder.encode(stored), labels, scale)
        finite = mean.isfinite()
        self.loss_sum += torch.stack([torch.where(finite, mean, 0), finite])

    def nonfinite(self) -> dict[str, int]:
        """How many gradient values of which parameter were not finite so far and counted as 0 (spec 4.2)."""
        return {name: n for name, n in zip(self.names, self.optimizer.nonfinite.tolist(), strict=True) if n}

    def mean_loss(self) -> float:
        """Mean loss per element since the last call, over all processes; NaN if there was no finite one."""
        total, count = self.world.sum(self.loss_sum).tolist()
        self.loss_sum.zero_()
        return total / count if count else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on besides the options."""
        return {
            "nimg": self.nimg,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "nonfinite": self.optimizer.nonfinite,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.nonfinite.copy_(state["nonfinite"])
        self.prepared.refresh()
        self.nimg = state["nimg"]


# -------------------------------------------------------------------------------------------------------- run directory


class RunDir:
    """The files of one run, and the only writer of them: options, log, statistics.

    Opening checks that the directory is new, or holds this very run: UserError lists the differences otherwise
    (see ``config.FREE_TO_CHANGE`` for what may differ), unless ``override``.
    """

    def __init__(self, path: Path, description: dict[str, Any], override: bool = False) -> None:
        self.path = path
        options_file = path / "options.json"
        self.description = json.loads(json.dumps(description))
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is not a directory")
        if options_file.exists():
            try:
                changed = config.differences(json.loads(options_file.read_text(encoding="utf-8")), self.description)
            except ValueError as error:
                raise UserError(f"{options_file} is damaged ({error})") from error
            if changed and not override:
                raise UserError(
                    f"{path} holds a run with other options:\n  "
                    + "\n  ".join(changed)
                    + "\nChoose another --outdir, repeat the old options, or continue with the new ones by --override."
                )
        elif path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run of this program; choose another --outdir")
        path.mkdir(parents=True, exist_ok=True)
        if not options_file.exists():
            self.write_options()
        self._log = open(path / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - until close()
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._log.close()
            raise UserError(f"another process is training in {path}") from error
        for leftover in (*path.glob(".training-state-*.tmp"), *path.glob(".network-snapshot-*.tmp")):
            leftover.unlink()  # of a process that was killed while writing

    def write_options(self) -> None:
        """Write options.json, from here on what a later run is compared with."""
        checkpoint.write_text(self.path / "options.json", json.dumps(self.description, indent=2) + "\n")

    def log(self, text: str) -> None:
        """Append a line to log.txt and print it."""
        tqdm.tqdm.write(text)
        self._log.write(text + "\n")

    def append_stats(self, stats: dict[str, float]) -> None:
        """Append one JSON object to stats.jsonl."""
        with open(self.path / "stats.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(stats) + "\n")

    def trim_stats(self, nimg: int) -> None:
        """Drop statistics after ``nimg`` (and a half-written line): a resumed run reports them again."""
        path = self.path / "stats.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["Progress/kimg"] * 1000 <= nimg:
                    kept.append(line + "\n")
        checkpoint.write_text(path, "".join(kept))

    def latest_state(self) -> dict[str, Any] | None:
        """The newest training state that is whole; says so when a newer one is damaged. None if there is none."""
        for path in checkpoint.list_states(self.path):
            try:
                state = checkpoint.load_state(path)
            except UserError as error:
                self.log(f"WARNING: {error}; falling back to the training state before it")
                continue
            self.log(f"resuming from {path}")
            return state
        return None

    def drop_old_states(self) -> None:
        """Keep only the newest training states."""
        for path in checkpoint.list_states(self.path)[STATES_KEPT:]:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._log.close()


# ----------------------------------------------------------------------------------------------------------------- loop


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

    Raises UserError for whatever the person starting it can put right and OSError when files cannot be written.
    """
    world = world or World()
    options.validate(world.size)
    rng.reseed(options.seed, world.rank)
    encoder = dataset.encoder()
    channels = network_channels(dataset, encoder, world.device)
    net = build_network(options, dataset.resolution, channels, dataset.label_dim)
    stop_point(options, 0)
    dataset.preload(progress and world.rank == 0)
    run = None
    if world.rank == 0:  # from here on files are written
        run = RunDir(Path(outdir), describe(options, dataset, encoder, net, world), override)
    try:
        return _train(options, world, dataset, encoder, net, run, progress)
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
    report = _Reporter(trainer, run, world, elapsed)
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
            if run is not None and _due(nimg, options.snapshot) and not resumed_here:
                _save_snapshots(trainer, run.path, dataset, encoder)
            if options.checkpoint and (done or nimg % options.checkpoint == 0) and nimg != first:
                world.check_equal(net)
                if run is not None:
                    _save_state(trainer, run, report.elapsed())
            if done:
                return nimg
            report.stop_maintenance()
            trainer.step(batches)
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
        trainer.load_state_dict(state[0])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"the training state does not fit this network ({error}); choose another --outdir") from error
    return state[0]["elapsed"]


def _save_snapshots(trainer: Trainer, path: Path, dataset: data.Dataset, encoder: data.Encoder) -> None:
    """One file for each tracked average (spec 5.3)."""
    for sigma_rel, profile in zip(trainer.ema.sigma_rels, trainer.ema.profiles, strict=True):
        checkpoint.save_snapshot(
            path / checkpoint.snapshot_name(trainer.nimg, sigma_rel),
            trainer.net,
            nimg=trainer.nimg,
            sigma_rel=sigma_rel,
            ema_kind="power",
            dataset=dataset.facts(),
            encoder=encoder.facts(),
            parameters=profile,
        )


def _save_state(trainer: Trainer, run: RunDir, elapsed: float) -> None:
    state = {"format_version": checkpoint.FORMAT_VERSION, "elapsed": elapsed, **trainer.state_dict()}
    checkpoint.save_state(run.path / checkpoint.state_name(trainer.nimg), state)
    run.drop_old_states()


class _Reporter:
    """Status lines and statistics (spec 4.8, item 1). Time outside the optimizer steps is maintenance."""

    def __init__(self, trainer: Trainer, run: RunDir | None, world: World, elapsed: float) -> None:
        self.trainer = trainer
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
        if self.run is not None:
            self.run.log(_status_line(stats))
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
