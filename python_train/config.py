"""What a training run is told: presets (spec 4.4), validation (spec 4.5) and comparison of two sets of options."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Any, Literal

from edm2ext.phema import STORAGES
from python_train import UserError

PRECISIONS = ("fp32", "fp16", "bf16")
FORCE_NORMALIZE = ("forward", "step")
PARALLEL = ("ddp", "fsdp")
_SUFFIXES = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def parse_nimg(text: str | int) -> int:
    """A number of images: a non-negative integer, optionally with Ki, Mi or Gi (``"8Mi"`` is 8 * 2**20)."""
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi|)", str(text).strip())
    if match is None:
        raise UserError(f"expected a number of images such as 4096, 128Ki, 8Mi or 2Gi, got {text!r}")
    return int(match[1]) * _SUFFIXES[match[2]]


def format_nimg(nimg: int) -> str:
    """The shortest exact spelling that :func:`parse_nimg` reads back."""
    for suffix, unit in reversed(_SUFFIXES.items()):
        if nimg and nimg % unit == 0:
            return f"{nimg // unit}{suffix}"
    return str(nimg)


def parse_ints(text: str) -> tuple[int, ...]:
    """A comma-separated list of positive integers, e.g. ``"1,2,3,4"``; the empty string is the empty list."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"expected positive integers separated by commas, got {text!r}")
    return tuple(int(part) for part in parts)


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Everything that decides what a run computes. The defaults are the general-purpose ones of spec 4.4 and 4.8.

    All amounts of training are in images. ``lr`` is alpha_ref, ``decay`` is t_ref in iterations (0 = no decay),
    ``rampup`` is in images (0 = none). Intervals of 0 are off. ``batch_gpu`` None means the whole batch at once.
    ``sample`` is the interval of sample grids, for which ``vae`` decodes latents; ``metric_images`` images are compared
    with the data then (0 = none). ``wandb`` names a project.
    ``loss_scaling`` multiplies the loss and is divided out of the gradients again; "dynamic" adapts it to them.
    ``init_from`` names the snapshot whose weights a new run starts from; with ``reinit`` layers that do not fit it
    start anew. Of the training states, the last ``keep`` are kept (0 = all), and those at multiples of ``keep_every``.
    """

    data: str = "digits"
    cond: bool = True
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    dropout: float = 0.0
    P_mean: float = -0.4
    P_std: float = 1.0
    batch: int = 2048
    batch_gpu: int | None = None
    duration: int = 8 * 2**30
    slice: int = 0
    lr: float = 0.0100
    decay: float = 70000
    rampup: int = 10_000_000
    precision: str = "fp16"
    loss_scaling: float | Literal["dynamic"] = 1.0
    force_normalize: str = "forward"
    sigma_rels: tuple[float, ...] = (0.050, 0.100)
    init_from: str | None = None
    reinit: bool = False
    seed: int = 0
    status: int = 128 * 2**10
    snapshot: int = 8 * 2**20
    snapshot_storage: str = "fp16"
    checkpoint: int = 128 * 2**20
    sample: int = 0
    metric_images: int = 0
    vae: str | None = None
    tensorboard: bool = True
    wandb: str | None = None
    parallel: str = "ddp"
    recompute: bool = False
    cuda_graph: bool = False
    keep: int = 3
    keep_every: int = 0

    def network_config(self, resolution: int, channels: int, label_dim: int) -> dict[str, Any]:
        """Constructor arguments of :class:`python_train.network.Precond` for the given data."""
        return {
            "img_resolution": resolution,
            "img_channels": channels,
            "label_dim": label_dim,
            "use_fp16": self.precision != "fp32",
            "model_channels": self.model_channels,
            "channel_mult": list(self.channel_mult),
            "num_blocks": self.num_blocks,
            "attn_resolutions": list(self.attn_resolutions),
            "channels_per_head": self.channels_per_head,
            "dropout": self.dropout,
        }

    def rounds(self, world_size: int) -> tuple[int, int]:
        """(images per round on one process, accumulation rounds), spec 4.5. Raises UserError if inexact."""
        if self.batch % world_size:
            raise UserError(f"batch {self.batch} is not divisible by the {world_size} processes")
        per_process = self.batch // world_size
        micro = min(self.batch_gpu or per_process, per_process)
        if per_process % micro:
            raise UserError(f"batch per process {per_process} is not divisible by batch-gpu {micro}")
        return micro, per_process // micro

    def validate(self, world_size: int = 1) -> None:
        """Raise UserError, naming the numbers, where the options contradict each other (spec 4.5)."""
        for name in ("batch", "model_channels", "num_blocks", "channels_per_head", "lr", "P_std", "duration"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("P_mean", "decay"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} must be a finite number, got {getattr(self, name)}")
        if self.batch_gpu is not None and self.batch_gpu <= 0:
            raise UserError(f"batch_gpu must be positive, got {self.batch_gpu}")
        if not self.channel_mult:
            raise UserError("channel_mult must name at least one level")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.force_normalize not in FORCE_NORMALIZE:
            raise UserError(
                f"force_normalize must be one of {', '.join(FORCE_NORMALIZE)}, got {self.force_normalize!r}"
            )
        if self.parallel not in PARALLEL:
            raise UserError(f"parallel must be one of {', '.join(PARALLEL)}, got {self.parallel!r}")
        if self.parallel == "fsdp" and self.force_normalize == "forward":
            raise UserError(
                "parallel fsdp needs force-normalize step: a forward pass sees gathered copies of the weights, and "
                "what it overwrites in them is lost; the optimizer's step normalises each process's own rows"
            )
        if self.snapshot_storage not in STORAGES:
            raise UserError(f"snapshot_storage must be one of {', '.join(STORAGES)}, got {self.snapshot_storage!r}")
        if self.loss_scaling != "dynamic" and not 2**-24 <= self.loss_scaling <= 2**24:
            raise UserError(f"loss_scaling must be 'dynamic' or between 2^-24 and 2^24, got {self.loss_scaling}")
        if self.reinit and self.init_from is None:
            raise UserError("reinit is about the layers that do not fit the snapshot of init_from, which is not given")
        if self.keep < 0:
            raise UserError(f"keep must not be negative, got {self.keep}")
        if self.keep_every and (not self.checkpoint or self.keep_every % self.checkpoint):
            raise UserError(f"keep_every {self.keep_every} is not a multiple of checkpoint {self.checkpoint}")
        self.rounds(world_size)
        for name in ("metric_images", "vae"):
            if getattr(self, name) and not self.sample:
                raise UserError(f"{name.replace('_', '-')} is for what sample draws: give its interval too")
        if self.metric_images < 0 or self.metric_images == 1:
            raise UserError(f"metric_images must be at least 2, or 0 for none, got {self.metric_images}")
        for name in ("duration", "slice", "status", "snapshot", "checkpoint", "sample"):
            value = getattr(self, name)
            if value % self.batch:
                raise UserError(f"{name} {value} is not divisible by batch {self.batch}")
        for name in ("snapshot", "checkpoint", "sample"):
            value = getattr(self, name)
            if value % 1024:
                raise UserError(f"{name} {value} is not divisible by 1024 (file names count thousands of images)")

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


_MI = 2**20
_DIGITS: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "P_mean": -0.8,
    "P_std": 1.2,
    "batch": 128,
    "duration": 80 * 2**10,
    "lr": 0.0100,
    "decay": 400,
    "rampup": 10_000,
    "precision": "fp32",
    "status": 4 * 2**10,
    "snapshot": 8 * 2**10,
    "checkpoint": 32 * 2**10,
    "sample": 40 * 2**10,
}


def _img512(channels: int, mi: int, lr: float, dropout: float) -> dict[str, Any]:
    return {"model_channels": channels, "duration": mi * _MI, "lr": lr, "decay": 70000, "dropout": dropout}


def _img64(channels: int, mi: int, lr: float, dropout: float) -> dict[str, Any]:
    noise = {"P_mean": -0.8, "P_std": 1.6}
    return {"model_channels": channels, "duration": mi * _MI, "lr": lr, "decay": 35000, "dropout": dropout, **noise}


PRESETS: dict[str, dict[str, Any]] = {
    "digits": _DIGITS,
    "img512-xxs": _img512(64, 2048, 0.0170, 0.00),
    "img512-xs": _img512(128, 2048, 0.0120, 0.00),
    "img512-s": _img512(192, 2048, 0.0100, 0.00),
    "img512-m": _img512(256, 2048, 0.0090, 0.10),
    "img512-l": _img512(320, 1792, 0.0080, 0.10),
    "img512-xl": _img512(384, 1280, 0.0070, 0.10),
    "img512-xxl": _img512(448, 896, 0.0065, 0.10),
    "img64-xs": _img64(128, 1024, 0.0120, 0.00),
    "img64-s": _img64(192, 1024, 0.0100, 0.00),
    "img64-m": _img64(256, 2048, 0.0090, 0.10),
    "img64-l": _img64(320, 1024, 0.0080, 0.10),
    "img64-xl": _img64(384, 640, 0.0070, 0.10),
}


def make_options(preset: str | None = None, **overrides: Any) -> TrainOptions:
    """Options of a preset with some of them overridden (None = not given). An unknown preset: UserError lists them."""
    if preset is not None and preset not in PRESETS:
        near = difflib.get_close_matches(preset.lower(), PRESETS, n=1, cutoff=0.7)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown preset {preset!r}{meant}; the presets are: {', '.join(PRESETS)}")
    given = {key: value for key, value in overrides.items() if value is not None}
    return TrainOptions(**{**(PRESETS[preset] if preset else {}), **given})


# A run may be continued for longer, reported more often or on another device without becoming another run.
FREE_TO_CHANGE = frozenset(
    {"duration", "slice", "status", "snapshot", "snapshot_storage", "checkpoint", "parallel", "recompute", "cuda_graph"}
    | {"sample", "metric_images", "vae", "tensorboard", "wandb", "keep", "keep_every"}
)
_NOT_OPTIONS = frozenset({"format_version", "run", "versions"})


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``["lr: 0.01 -> 0.02", ...]`` for every value that differs, except those in :data:`FREE_TO_CHANGE`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after and key not in FREE_TO_CHANGE | _NOT_OPTIONS:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines
