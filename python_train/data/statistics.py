"""Mean and standard deviation of each channel, stored with the data (spec 1.2)."""

from __future__ import annotations

import copy
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from python_train import UserError
from python_train.checkpoint import atomic_write, write_text
from python_train.data.container import INDEX, Index, Source, Statistics, find_labels, read_index
from python_train.data.images import decode_array, is_item
from python_train.data.staging import chunked, default_workers, in_processes

CHUNK = 256


class Moments:
    """Sums over the elements of each channel; those of latents count the variance of their posteriors."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: np.ndarray | float = 0.0
        self.squares: np.ndarray | float = 0.0

    def add(self, array: np.ndarray) -> None:
        """Add one stored item [C, H, W]: uint8 pixels, or float32 means and standard deviations."""
        values = array.reshape(len(array), -1).astype(np.float64)
        spread = np.zeros([1, 1])
        if array.dtype == np.float32:
            values, spread = np.split(values, 2)
        self.count += values.shape[1]
        self.sum = self.sum + values.sum(axis=1)
        self.squares = self.squares + (values**2 + spread**2).sum(axis=1)

    def merge(self, other: Moments) -> None:
        """Add what another has summed."""
        self.count += other.count
        self.sum, self.squares = self.sum + other.sum, self.squares + other.squares

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "sum": np.asarray(self.sum).tolist(), "squares": np.asarray(self.squares).tolist()}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Moments:
        moments = Moments()
        moments.count = content["count"]
        moments.sum, moments.squares = np.array(content["sum"]), np.array(content["squares"])
        return moments

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel. Raises UserError for a channel that is constant."""
        mean = self.sum / self.count
        variance = np.maximum(self.squares / self.count - mean**2, 0)
        if not (variance > 0).all():
            raise UserError(f"channel {int(np.argmin(variance))} is constant over the whole data set: no statistics")
        return Statistics(tuple(mean), tuple(np.sqrt(variance)))


def measure(path: str | os.PathLike[str], workers: int | None = None, progress: bool = False) -> Statistics:
    """Statistics of all items of a folder or ZIP. Raises UserError, naming the file, for an unreadable one."""
    source = Source(path, is_item)
    source.require_sound()
    names = [name for name in source.names if name != INDEX]
    if not names:
        raise UserError(f"no images (.png, .jpg, ... or .npy) in {source.path}")
    parts = [source.subset(part) for part in chunked(names, CHUNK)]
    order, found = {part.names[0]: i for i, part in enumerate(parts)}, {}
    with tqdm.tqdm(total=len(names), desc="measuring", unit="img", disable=not progress) as bar:
        for first, size, moments in in_processes(_measure_part, parts, workers or default_workers()):
            found[order[first]] = moments
            bar.update(size)
    total = Moments()
    for i in range(len(parts)):  # in one order, whichever process was first: the same sums every time
        if np.shape(found[i].sum) != np.shape(found[0].sum):
            raise UserError(f"{source.path}: {parts[i].names[0]} and {names[0]} differ in their channels")
        total.merge(found[i])
    return total.statistics()


def _measure_part(source: Source) -> tuple[str, int, Moments]:
    moments = Moments()
    for name in source.names:
        array = decode_array(f"{source.path}: {name}", name, source.read(name))
        if moments.count and np.shape(moments.sum)[0] != len(array) // (1 + (array.dtype == np.float32)):
            raise UserError(f"{source.path}: {name} and {source.names[0]} differ in their channels")
        moments.add(array)
    return source.names[0], len(source.names), moments


def store(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Write the statistics into the data set's ``dataset.json``, with the labels of class folders; a ZIP is copied for
    that, and replaced at the end. Raises UserError for an item that is in none of the class folders."""
    source = Source(path, is_item)
    source.require_sound()
    index = read_index(source)
    if index is None:
        names = [name for name in source.names if name != INDEX]
        labels, class_names, problems = find_labels(names, None)
        if problems:  # with a dataset.json folders are no classes any more
            raise UserError(f"{source.path}: {problems[0].name} {problems[0].reason}: the labels would be lost")
        index = Index() if labels is None else Index(list(zip(names, labels.tolist(), strict=True)), class_names)
        content = json.loads(index.to_json())
    else:
        content = json.loads(source.read(INDEX))
    content["statistics"] = statistics.to_json()
    text = json.dumps(content)
    if source.is_zip:
        _replace_index(Path(path), text)
    else:
        write_text(Path(path) / INDEX, text)


def _replace_index(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(temporary, "w") as new:
            for entry in old.infolist():
                if entry.filename != INDEX:
                    with old.open(entry) as content, new.open(copy.copy(entry), "w") as file:
                        shutil.copyfileobj(content, file)
            new.writestr(zipfile.ZipInfo(INDEX), text)
        shutil.copymode(path, temporary)
