"""New averages of stored ones, from files to files or into memory (5.4)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edm2ext.phema.fit import ROUNDING, Target, fit
from edm2ext.phema.motion import Motion, estimate_motion
from edm2ext.phema.output import OutputFiles
from edm2ext.phema.stored import HEADER, StoredAverage, open_average
from edm2ext.phema.stream import DEFAULT_MEMORY, Combination, sample, stream


@dataclass(frozen=True)
class Quality:
    """How good a reconstruction is going to be; all errors are relative.

    profile_error: of the averaging profile. sum_abs: of the coefficients. rounding_noise: of the weights, expected from
    the storage of the inputs. expected_error: of the weights, from both, the output's rounding not included; NaN if
    nothing was read to estimate it. sigma_rel: the width of the profile that is really made.
    """

    target: Target
    profile_error: float
    sum_abs: float
    rounding_noise: float
    expected_error: float
    sigma_rel: float


class Reconstruction:
    """Averages with the profiles of `targets`, as combinations of stored ones of one run.

    averages: in any order. Those at time 0 and after the last target's time are not averaged. targets: widths
    sigma_rel, or `Target`. groups: maps patterns of parameter names (``"unet.enc.*"``) to widths that those parameters
    get instead in every target; the first pattern that fits counts. kind: of the least-squares problem, see `fit`.
    Raises ValueError for averages that do not hold the same tensors, and as `fit` does.
    """

    def __init__(
        self,
        averages: Sequence[StoredAverage],
        targets: Sequence[Target | float],
        groups: Mapping[str, float] | None = None,
        kind: str = "weights",
    ) -> None:
        self.targets = [t if isinstance(t, Target) else Target(float(t)) for t in targets]
        self.groups, self.kind = dict(groups or {}), kind
        if not self.targets:
            raise ValueError("reconstruct: targets must not be empty")
        ordered = sorted(averages, key=lambda average: (average.nimg, average.sigma_rel))
        times = [target.nimg for target in self.targets if target.nimg is not None]
        last = max(times) if len(times) == len(self.targets) else float("inf")
        self.inputs = [average for average in ordered if 0 < average.nimg <= last]
        if not self.inputs:
            raise ValueError("reconstruct: there is no stored average after time 0 and up to the target's time")
        self.nimg = np.array([average.nimg for average in self.inputs], dtype=np.float64)
        self.std = np.array([average.sigma_rel for average in self.inputs], dtype=np.float64)
        widths = [None, *self.groups.values()]
        wanted = [[_with_width(target, width) for target in self.targets] for width in widths]
        self.fits = [fit(self.nimg, self.std, group, kind) for group in wanted]
        coefs = [np.stack([found.coefs for found in fits], axis=1) for fits in self.fits]
        self.combination = Combination(self.inputs, coefs, self._group_of)
        for pattern, group in zip(self.groups, range(1, len(widths)), strict=True):
            if not any(span.group == group for span in self.combination.spans):
                raise ValueError(f"reconstruct: no parameter is named like {pattern!r}, or another pattern takes it")

    def _group_of(self, name: str) -> int:
        return next((i for i, pattern in enumerate(self.groups, 1) if fnmatchcase(name, pattern)), 0)

    @property
    def rounding(self) -> np.ndarray:
        """Relative rounding error of each input."""
        return np.array([ROUNDING[average.storage] for average in self.inputs])

    def motion(self, threads: int = 8) -> Motion:
        """What a few of the inputs' weights tell about the way of all of them."""
        updates = [average.header.get("updates", 0) for average in self.inputs]
        return estimate_motion(self.nimg, self.std, sample(self.combination, threads=threads), self.rounding, updates)

    def quality(self, motion: Motion | None = None) -> list[Quality]:
        """What to expect of each target, and then of the widths that groups have; without motion, of the profiles."""
        found = []
        for result in (*self.fits[0], *(fits[0] for fits in self.fits[1:])):
            expected = float("nan")
            if motion is not None:
                (closest,) = [result] if self.kind == "weights" else fit(self.nimg, self.std, [result.target])
                expected = motion.expected_error(result, closest)
            noise = result.rounding_noise(self.rounding)
            found.append(
                Quality(result.target, result.profile_error, result.sum_abs, noise, expected, result.sigma_rel)
            )
        return found

    def time_of(self, target: Target) -> float:
        """When the average of a target ends."""
        return float(self.nimg[-1]) if target.nimg is None else target.nimg

    def header(self, target: Target) -> dict[str, Any]:
        """What a result's file says of it."""
        time = self.time_of(target)
        header = {"nimg": int(time) if time == int(time) else time, "sigma_rel": target.sigma_rel, "ema_kind": "phema"}
        if target.shape != "power":
            header["shape"] = target.shape
        if self.groups:
            header["sigma_rel_of"] = self.groups
        return header

    def to_files(
        self,
        paths: Sequence[str | os.PathLike[str]],
        headers: Sequence[Mapping[str, Any]] | None = None,
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        memory: int = DEFAULT_MEMORY,
        threads: int = 8,
        progress: Callable[[int], None] = lambda elements: None,
    ) -> None:
        """Write one safetensors file for each target in one pass over the inputs, in bounded memory.

        The files appear together when all are whole. After an interruption the same call continues. progress is told
        how many elements of each output are written, again and again.
        """
        if len(paths) != len(self.targets):
            raise ValueError(f"reconstruct: expected {len(self.targets)} output paths, got {len(paths)}")
        if dtype not in (torch.float16, torch.float32):
            raise ValueError(f"reconstruct: dtype must be float16 or float32, got {dtype}")
        _check_device(device)  # before anything is written
        headers = headers or [self.header(target) for target in self.targets]
        buffers = {"buffers": sorted(self.combination.copied)} if self.combination.copied else {}
        metadata = [{HEADER: json.dumps({**header, **buffers})} for header in headers]
        with OutputFiles(self.combination, [Path(path) for path in paths], metadata, dtype, self.kind) as files:

            def written(position: int) -> None:
                files.written(position)
                progress(position)

            progress(files.position)
            stream(
                self.combination, files.sinks(), dtype=dtype, device=device, memory=memory, threads=threads,
                first=files.position, written=written,
            )  # fmt: skip
            files.commit()

    def in_memory(
        self,
        *,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        memory: int = DEFAULT_MEMORY,
        threads: int = 8,
        progress: Callable[[int], None] = lambda elements: None,
    ) -> list[dict[str, Tensor]]:
        """The state dict of each target, on the CPU."""
        _check_device(device)
        sinks = [_Memory(self.combination, m, dtype) for m in range(len(self.targets))]
        stream(
            self.combination, sinks, dtype=dtype, device=device, memory=memory, threads=threads, written=progress
        )  # fmt: skip
        return [sink.tensors() for sink in sinks]


class _Memory:
    """An output in memory (`edm2ext.phema.stream.Sink`)."""

    def __init__(self, combination: Combination, output: int, dtype: torch.dtype) -> None:
        self.combination, self.output = combination, output
        self.values = torch.empty(combination.numel, dtype=dtype)

    def write(self, first: int, values: Tensor) -> None:
        self.values[first : first + len(values)] = values

    def tensors(self) -> dict[str, Tensor]:
        """By name, in the inputs' order; those that are not averaged are the last input's."""
        starts = self.combination.offsets()
        found = {}
        for name in self.combination.inputs[0].tensors:
            shape = self.combination.shape(name)
            if name in starts:
                flat = self.values[starts[name] : starts[name] + int(np.prod(shape))]
                found[name] = flat.reshape(shape)
            else:
                value = self.combination.read_copied(name, self.output)
                found[name] = value.to(self.values.dtype) if value.is_floating_point() else value
        return found


def reconstruct(
    averages: Sequence[StoredAverage | str | os.PathLike[str]],
    targets: Sequence[Target | float],
    outputs: Sequence[str | os.PathLike[str]] | None = None,
    *,
    groups: Mapping[str, float] | None = None,
    kind: str = "weights",
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    memory: int = DEFAULT_MEMORY,
    threads: int = 8,
) -> list[dict[str, Tensor]] | None:
    """Averages with other profiles than the stored ones, of anybody's safetensors files (5.4), in one pass over them.

    Args:
        averages: files that tell their time and width themselves (`PowerEMA.save`, snapshots of a training run), or
            ``open_average(path, nimg=..., sigma_rel=...)`` for those that do not.
        targets: widths sigma_rel, or `Target` for another time or shape.
        outputs: a safetensors file to write for each target. None: state dicts are returned instead.
        groups: other widths for the parameters whose names match a pattern, see `Reconstruction`.
        kind: "weights" for the least error of the weights, "profile" for the published coefficients, see `fit`.
        dtype: of the results, float16 or float32.
        device: where sums are made. memory: bytes of all buffers. threads: that read, and that write.

    Names are compared without what torch.compile puts into them. Raises ValueError for files that are missing, damaged
    or do not hold the same tensors, and for targets that cannot be made; OSError if the outputs cannot be written.
    """
    opened = [a if isinstance(a, StoredAverage) else open_average(a) for a in averages]
    work = Reconstruction(opened, targets, groups, kind)
    settings = {"dtype": dtype, "device": device, "memory": memory, "threads": threads}
    if outputs is None:
        return work.in_memory(**settings)
    return work.to_files(outputs, **settings)


def _check_device(device: torch.device | str) -> None:
    """Raise ValueError if there is none of that name here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"reconstruct: device {str(device)!r} cannot be used here: {reason}") from error


def _with_width(target: Target, width: float | None) -> Target:
    return target if width is None else replace(target, sigma_rel=width)
