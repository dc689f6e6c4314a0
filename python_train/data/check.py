"""Find everything that is wrong with a data set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tqdm

from python_train import UserError
from python_train.data.container import INDEX, Index, Problem, Source, find_labels, read_index
from python_train.data.images import decode_array, is_item
from python_train.data.reader import describe_shape
from python_train.data.staging import chunked, default_workers, in_processes

CHUNK = 256
Alike = tuple[tuple[int, ...], np.dtype]


class Report(NamedTuple):
    """What a check found: number of items, what most of them are, the problems in the order of names."""

    items: int
    description: str
    problems: list[Problem]


def check(path: str | os.PathLike[str], workers: int | None = None, progress: bool = False) -> Report:
    """Read every item of a folder or ZIP and look for what is unreadable, of another shape than most, or mislabelled.

    Raises UserError only where there is no data set at all.
    """
    source = Source(path, is_item)
    names = [name for name in source.names if name != INDEX]
    problems = list(source.problems)
    shapes: dict[str, Alike] = {}
    tasks = [source.subset(part) for part in chunked(names, CHUNK)]
    with tqdm.tqdm(total=len(names), desc="checking", unit="img", disable=not progress) as bar:
        for found, bad in in_processes(_read_all, tasks, workers or default_workers()):
            shapes.update(found)
            problems += bad
            bar.update(len(found) + len(bad))
    description = "no readable images"
    if shapes:
        usual, _ = Counter(shapes[name] for name in names if name in shapes).most_common(1)[0]
        description = describe_shape(*usual)
        for name, alike in shapes.items():
            if alike != usual:
                problems.append(Problem(name, f"is {describe_shape(*alike)} where most are {description}"))
    problems += _label_problems(source, names)
    if not names and not problems:
        problems = [Problem(str(path), "holds no images")]
    return Report(len(names), description, sorted(set(problems)))


def _read_all(source: Source) -> tuple[dict[str, Alike], list[Problem]]:
    found = {name: _read(source, name) for name in source.names}
    shapes = {name: result for name, result in found.items() if not isinstance(result, Problem)}
    return shapes, [result for result in found.values() if isinstance(result, Problem)]


def _read(source: Source, name: str) -> Alike | Problem:
    try:
        array = decode_array("it", name, source.read(name))
    except UserError as error:
        return Problem(name, str(error).removeprefix("it "))
    if not np.isfinite(array).all():
        return Problem(name, "has values that are not finite")
    if array.dtype == np.float32 and (array[len(array) // 2 :] < 0).any():
        return Problem(name, "has standard deviations (its second half of channels) below 0")
    return array.shape, array.dtype


def _label_problems(source: Source, names: list[str]) -> Iterator[Problem]:
    try:
        index = read_index(source)
    except UserError as error:
        yield Problem(INDEX, str(error))
        return
    yield from find_labels(names, index).problems
    yield from _strays(index, set(names) | {problem.name for problem in source.problems})


def _strays(index: Index | None, present: set[str]) -> Iterator[Problem]:
    for name, _ in (index.labels if index else None) or []:
        if name not in present:
            yield Problem(name, f"has a label in {INDEX}, but there is no such file")
