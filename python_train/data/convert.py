"""Convert images of any kind to a data set of one size (spec 8.3)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import PIL
import tqdm

from python_train import UserError
from python_train.data.container import INDEX, Index, Source, find_labels, item_name, read_index
from python_train.data.images import decode_rgb, encode_png, is_item
from python_train.data.staging import Staging, chunked, default_workers, in_processes, open_chunk, write_chunk
from python_train.data.transforms import Size, make_transform

CHUNK = 256
_RESULTS = "results.json"


class Converted(NamedTuple):
    """What a conversion did: images written and left out, their size, whether they are labelled, and why not."""

    written: int
    skipped: int
    size: Size
    label_kind: str
    remark: str


class _Task(NamedTuple):
    source: Source
    transform: str
    size: Size | None
    chunk: Path


def convert(
    source_path: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    transform: str = "none",
    size: Size | None = None,
    max_images: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Converted:
    """Make the data set ``dest``, a ZIP if its name ends so and else a folder, of the images in a folder or ZIP.

    ``size`` is (width, height). Files are taken in the order of their sorted names, at most ``max_images`` of them.
    Labels come from the source's ``dataset.json`` or from its top-level folders; if any image lacks one, none is kept
    (spec 8.1). Raises UserError, naming the file, for what cannot be read, and where the results differ in size.
    An interrupted conversion is continued by the same call.
    """
    make_transform(transform, size)
    source = Source(source_path, _is_picture)
    source.require_sound()
    names = [name for name in source.names if name != INDEX][:max_images]
    if not names:
        raise UserError(f"no images (.png, .jpg, ...) in {source.path}")
    labels, class_names, remark = find_kept_labels(source, names)
    with Staging(dest) as staging:
        chunks, tasks = [], []
        for number, part in enumerate(chunked(names, CHUNK)):
            made_from = (PIL.__version__, transform, size, [(name, source.signature(name)) for name in part])
            chunks.append(staging.chunk(number, made_from))
            if not chunks[-1].exists():
                tasks.append(_Task(source.subset(part), transform, size, chunks[-1]))
        todo = sum(len(task.source.names) for task in tasks)
        bar = tqdm.tqdm(
            total=len(names), initial=len(names) - todo, desc="converting", unit="img", disable=not progress
        )
        with bar:
            for done in in_processes(_convert_chunk, tasks, workers or default_workers()):
                bar.update(done)
        made = [(name, tuple(result)) for chunk in chunks for name, result in _results(chunk) if result]
        if not made:
            raise UserError(f"{source.path}: all {len(names)} images are too small for {transform}")
        first_name, first = made[0]
        for name, result in made:
            if result != first:
                raise UserError(
                    f"{source.path}: {name} becomes {result[0]}x{result[1]}, but {first_name} {first[0]}x{first[1]}; "
                    "a resolution (and a transform) makes all alike"
                )
        staging.finish(
            ((item_name(index), content) for index, content in enumerate(_contents(chunks))),
            lambda: Index(
                None if labels is None else [(item_name(i), labels[name]) for i, (name, _) in enumerate(made)],
                class_names,
            ),
        )
    kind = "none" if labels is None else "vector" if isinstance(labels[names[0]], list) else "index"
    return Converted(len(made), len(names) - len(made), first, kind, remark)


def _is_picture(name: str) -> bool:
    return is_item(name) and not name.lower().endswith(".npy")


def find_kept_labels(
    source: Source, names: Sequence[str]
) -> tuple[dict[str, int | list[float]] | None, list[str] | None, str]:
    """Label of every name, or None if one has none and a remark that says so; UserError for labels that are wrong."""
    index = read_index(source)
    values, class_names, problems = find_labels(names, index)
    missing = [problem for problem in problems if index is None or problem.reason == "has no label"]
    wrong = [problem for problem in problems if problem not in missing]
    if wrong:
        raise UserError(f"{source.path}: {wrong[0].name} {wrong[0].reason}")
    if missing:
        remark = f"{len(missing)} of {len(names)} images have no label, such as {missing[0].name}: none is kept"
        return None, None, remark
    if values is None:
        return None, None, ""
    if index is not None and index.labels is not None:
        return dict(index.labels), class_names, ""
    return dict(zip(names, values.tolist(), strict=True)), class_names, ""


def _convert_chunk(task: _Task) -> int:
    """Convert the images of one chunk, and write it; returns how many there were."""
    transform = make_transform(task.transform, task.size)
    results: list[tuple[str, Size | None]] = []

    def items() -> Iterator[tuple[str, bytes]]:
        for name in task.source.names:
            image = transform(decode_rgb(f"{task.source.path}: {name}", task.source.read(name)))
            results.append((name, image.size if image else None))
            if image:
                yield f"{len(results):08d}.png", encode_png(image)
        yield _RESULTS, json.dumps(results).encode()

    write_chunk(task.chunk, items())
    return len(results)


def _results(chunk: Path) -> list[tuple[str, list[int] | None]]:
    return json.loads(open_chunk(chunk).read(_RESULTS))


def _contents(chunks: Sequence[Path]) -> Iterator[bytes]:
    for chunk in chunks:
        source = open_chunk(chunk)
        yield from (source.read(name) for name in source.names if name != _RESULTS)
