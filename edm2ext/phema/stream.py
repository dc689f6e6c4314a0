"""Weighted sums of files of tensors in one pass over them: tile by tile, each input byte read once.

A tile is a range of the parameters, seen as one long vector. While its sums are made, the next tile of all inputs is
read and the one before is written, by other threads; the sums themselves are made by as many threads as torch has, each
of a part of the tile, without waiting for each other. Memory is bounded whatever the numbers of inputs and outputs:
tiles get smaller.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edm2ext import ops
from edm2ext.phema.stored import OpenFiles, StoredAverage, StoredTensor

DEFAULT_MEMORY = 256 << 20
_BLOCK = 8192  # elements whose sums a thread makes at a time: those of all outputs stay in a cache
_TILE = 1 << 18  # elements of a tile at most: few enough that what is summed is still in the cache when it is written
_AHEAD = 2  # tiles whose inputs, and whose outputs, are in memory at a time
_FLOATING = (torch.float16, torch.bfloat16, torch.float32)


class Sink(Protocol):
    """Where the weights of one output go."""

    def write(self, first: int, values: Tensor) -> None:
        """Take the elements from `first` on, a vector in the output's dtype. Called from several threads."""


@dataclass(frozen=True)
class Span:
    """Parameters that follow each other and have the same coefficients and, in each input, the same dtype."""

    names: tuple[str, ...]
    starts: tuple[int, ...]  # of each of them within all
    stop: int
    group: int
    dtypes: tuple[torch.dtype, ...]  # of each input


class Combination:
    """Outputs as weighted sums of the averaged tensors of some inputs: checked, and laid out as one long vector.

    inputs: ordered by time. coefs: [inputs, outputs] of each group; group_of: the group of a parameter's name. The
    coefficients of inputs at the end may be 0 for an output: such inputs are not even looked at for it, so that it is
    good if they are not finite. Raises ValueError naming the file if the inputs do not hold the same tensors.
    """

    def __init__(
        self,
        inputs: Sequence[StoredAverage],
        coefs: Sequence[NDArray[np.float64]],
        group_of: Callable[[str], int] = lambda name: 0,
    ) -> None:
        self.inputs = list(inputs)
        self.coefs = [torch.from_numpy(np.ascontiguousarray(c, dtype=np.float64)) for c in coefs]
        first = self.inputs[0]
        for other in self.inputs:
            for name in first.tensors.keys() | other.tensors.keys():
                ours, theirs = first.tensors.get(name), other.tensors.get(name)
                if ours is None or theirs is None or ours.shape != theirs.shape:
                    raise ValueError(f"{other.path}: the tensor {name} is missing, unknown or of a wrong shape")
                if name not in first.copied and theirs.dtype not in _FLOATING:
                    raise ValueError(f"{other.path}: {name} must be float16, bfloat16 or float32, got {theirs.dtype}")
        self.copied = [name for name in first.tensors if name in first.copied]
        self.spans = self._spans(group_of)
        self.numel = self.spans[-1].stop if self.spans else 0
        self.outputs = self.coefs[0].shape[1]
        used = np.any([c.numpy() != 0 for c in self.coefs], axis=0)
        self.used = [int(np.flatnonzero(column)[-1]) + 1 if column.any() else 1 for column in used.T]

    def _spans(self, group_of: Callable[[str], int]) -> list[Span]:
        first = self.inputs[0]
        averaged = [name for name in first.tensors if name not in first.copied]
        kinds: dict[tuple, list[str]] = {}
        for name in averaged:
            dtypes = tuple(average.tensors[name].dtype for average in self.inputs)
            kinds.setdefault((group_of(name), dtypes), []).append(name)
        spans, at = [], 0
        for (group, dtypes), names in kinds.items():
            ends = list(itertools.accumulate((math.prod(first.tensors[n].shape) for n in names), initial=at))
            spans.append(Span(tuple(names), tuple(ends[:-1]), ends[-1], group, dtypes))
            at = ends[-1]
        return spans

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.inputs[0].tensors[name].shape)

    def offsets(self) -> dict[str, int]:
        """Where each averaged tensor starts in the long vector, in its order."""
        return {name: start for span in self.spans for name, start in zip(span.names, span.starts, strict=True)}

    def read_copied(self, name: str, output: int) -> Tensor:
        """A tensor that is not averaged, as the last input of an output has it."""
        source = self.inputs[self.used[output] - 1].tensors[name]
        value = torch.empty(math.prod(source.shape), dtype=source.dtype)
        with OpenFiles() as files:
            source.read(files, 0, value)
        return value.reshape(source.shape)

    def read_range(self, files: OpenFiles, span: Span, index: int, first: int, target: Tensor) -> None:
        """Fill target with the elements of one input from `first` on, all within a span; neighbours in one read."""
        average, stop = self.inputs[index], first + len(target)
        run: tuple[StoredTensor, int, int] | None = None  # (the last tensor, byte and element where the run starts)
        at = first
        for i in range(bisect.bisect_right(span.starts, first) - 1, len(span.names)):
            start = span.starts[i]
            if start >= stop:
                break
            end = min(span.starts[i + 1] if i + 1 < len(span.names) else span.stop, stop)
            source = average.tensors[span.names[i]]
            plain = isinstance(source, StoredTensor)
            follows = run is not None and plain and at == start and run[0].end == source.start
            if run is not None and not (follows and run[0].path == source.path):
                files.read_into(run[0].path, run[1], target[run[2] - first : at - first])
                run = None
            if not plain:
                source.read(files, at - start, target[at - first : end - first])
            elif run is None:
                run = source, source.start + (at - start) * source.dtype.itemsize, at
            else:
                run = source, run[1], run[2]
            at = end
        if run is not None:
            files.read_into(run[0].path, run[1], target[run[2] - first : at - first])


def stream(
    combination: Combination,
    sinks: Sequence[Sink],
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    memory: int = DEFAULT_MEMORY,
    threads: int = 8,
    first: int = 0,
    written: Callable[[int], None] = lambda position: None,
) -> None:
    """Make the sums and hand them to the sinks, one for each output, in `dtype` (float16 or float32).

    Sums are in float32. Where inputs and outputs are finer than float16, products and sums have twice that precision
    (`compensated` in `ops.accumulate_snapshots`), since large coefficients of both signs meet there. device: where sums
    are made. memory: bytes of all buffers together. threads: that read, and that write. first: the element to begin
    with; written(n) is called when all elements before n have been written, from this thread.
    """
    device = torch.device(device)
    block, tile = _sizes(combination, dtype, memory)
    tiles = list(_tiles(combination.spans, tile, first))
    if not tiles:
        return
    tile = max(stop - start for _, start, stop in tiles)
    buffers = [_Buffers(combination, dtype, tile) for _ in tiles[:_AHEAD]]
    slots = len(buffers)
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    width = min(block, tile) if device.type == "cpu" else tile
    totals = [torch.empty(combination.outputs, width, device=device) for _ in range(workers)]
    paths = [average.path for average in combination.inputs]
    with (
        OpenFiles(paths) as files,
        ThreadPoolExecutor(threads, "read") as readers,
        ThreadPoolExecutor(threads, "write") as writers,
        _one_thread_each(workers) as summers,
    ):
        reading: list[list[Future]] = [[] for _ in buffers]
        writing: list[tuple[int, list[Future]]] = [(first, []) for _ in buffers]

        def read(k: int) -> None:
            span, start, stop = tiles[k]
            targets = buffers[k % slots].inputs(span, stop - start)
            reading[k % slots] = [
                readers.submit(combination.read_range, files, span, n, start, target)
                for n, target in enumerate(targets)
            ]

        def finish_writing(k: int) -> None:
            position, futures = writing[k % slots]
            for future in futures:
                future.result()
            if futures:
                written(position)

        read(0)
        for k, (span, start, stop) in enumerate(tiles):
            for future in reading[k % slots]:
                future.result()
            if k + 1 < len(tiles):
                read(k + 1)
            finish_writing(k)
            buffer = buffers[k % slots]
            results = buffer.results(stop - start)
            inputs = buffer.inputs(span, stop - start)
            part = -(-(stop - start) // workers)
            summing = [
                summers.submit(_combine, combination, span, inputs, results, total, range(i * part, (i + 1) * part))
                for i, total in enumerate(totals)
            ]
            for future in summing:
                future.result()
            futures = [writers.submit(sink.write, start, row) for sink, row in zip(sinks, results, strict=True)]
            writing[k % slots] = stop, futures
        for k in range(len(tiles), len(tiles) + slots):
            finish_writing(k)


def sample(combination: Combination, blocks: int = 16, size: int = 1024, threads: int = 8) -> NDArray[np.float32]:
    """[inputs, weights]: the same few of the parameters of every input, in float32: blocks spread over all of them."""
    size = max(1, min(size, combination.numel // blocks))
    starts = np.linspace(0, combination.numel - size, blocks).astype(int) if combination.numel else []
    pieces = [piece for start in dict.fromkeys(map(int, starts)) for piece in _within(combination.spans, start, size)]

    def read(n: int) -> Tensor:
        parts = [torch.empty(stop - start, dtype=span.dtypes[n]) for span, start, stop in pieces]
        for (span, start, _), part in zip(pieces, parts, strict=True):
            combination.read_range(files, span, n, start, part)
        return torch.cat([part.float() for part in parts]) if parts else torch.zeros(0)

    with OpenFiles([average.path for average in combination.inputs]) as files, ThreadPoolExecutor(threads) as pool:
        return torch.stack(list(pool.map(read, range(len(combination.inputs))))).numpy()


def _within(spans: Sequence[Span], start: int, size: int) -> Iterator[tuple[Span, int, int]]:
    for span in spans:
        low, high = max(start, span.starts[0]), min(start + size, span.stop)
        if low < high:
            yield span, low, high


@contextlib.contextmanager
def _one_thread_each(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch does not start more of them: those would wait for each other after every block."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, "sum", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class _Buffers:
    """Room for a tile of all inputs, as they are stored, and of all outputs."""

    def __init__(self, combination: Combination, dtype: torch.dtype, tile: int) -> None:
        self._inputs = [torch.empty(tile * width, dtype=torch.uint8) for width in _widths(combination)]
        self._outputs = torch.empty(combination.outputs, tile, dtype=dtype)

    def inputs(self, span: Span, size: int) -> list[Tensor]:
        pairs = zip(self._inputs, span.dtypes, strict=True)
        return [raw[: size * dtype.itemsize].view(dtype) for raw, dtype in pairs]

    def results(self, size: int) -> Tensor:
        return self._outputs[:, :size]


def _widths(combination: Combination) -> list[int]:
    """Bytes of the widest element of each input."""
    return [
        max((span.dtypes[n].itemsize for span in combination.spans), default=1) for n in range(len(combination.inputs))
    ]


def _sizes(combination: Combination, dtype: torch.dtype, memory: int) -> tuple[int, int]:
    """Elements of a block and of a tile, so that all buffers fit into so much memory."""
    workers = torch.get_num_threads()
    block = max(256, min(_BLOCK, memory // (16 * combination.outputs * workers)))
    per_element = _AHEAD * (sum(_widths(combination)) + combination.outputs * dtype.itemsize)
    tile = min(_TILE, (memory - 4 * block * combination.outputs * workers) // per_element)
    return block, max(256, tile // block * block if tile > block else tile)


def _tiles(spans: Sequence[Span], size: int, first: int) -> Iterator[tuple[Span, int, int]]:
    for span in spans:
        for start in range(max(first, span.starts[0]), span.stop, size):
            yield span, start, min(start + size, span.stop)


def _combine(
    combination: Combination,
    span: Span,
    inputs: Sequence[Tensor],
    results: Tensor,
    totals: Tensor,
    part: range,
) -> None:
    """results[m] = sum over n of coefs[n, m] inputs[n], for the elements of a part, as many at a time as totals
    [outputs, block] has."""
    coefs = combination.coefs[span.group]
    columns: dict[int, list[int]] = {}
    for m, count in enumerate(combination.used):
        columns.setdefault(count, []).append(m)
    compensated = results.dtype == torch.float32 and torch.float32 in span.dtypes
    end, block = min(part.stop, results.shape[1]), totals.shape[1]
    for start in range(part.start, end, block):
        stop = min(start + block, end)
        for count, chosen in columns.items():
            total = totals[: len(chosen), : stop - start].zero_()
            pieces = [x[start:stop] for x in inputs[:count]]
            ops.accumulate_snapshots(pieces, coefs[:count, chosen], total, compensated=compensated)
            if len(chosen) == len(results):
                results[:, start:stop].copy_(total)
            else:
                for row, m in zip(total, chosen, strict=True):
                    results[m, start:stop].copy_(row)
