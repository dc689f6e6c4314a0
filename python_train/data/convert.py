"""Convert images of any kind to a data set of one size (spec 8.3)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import PIL
import tqdm

from python_train import UserError
from python_train.data.container import INDEX, Index, Source, classes_within, find_labels, item_name, read_index
from python_train.data.images import decode_rgb, encode_png, is_item
from python_train.data.staging import Staging, chunked, default_workers, in_processes, open_chunk, write_chunk
from python_train.data.transforms import Size, make_transform

CHUNK = 256
_RESULTS = "results.json"


class Converted(NamedTuple):
    """What a conversion did: images written and left out, their size, whether they are labelled, and what the user
    should know."""

    written: int
    skipped: int
    size: Size
    label_kind: str
    remarks: list[str]


class _Result(NamedTuple):
    """Of one image: the size that it has now, None if it was left out, and whether it lies on its side."""

    name: str
    size: Size | None
    lying: bool


class _Task(NamedTuple):
    source: Source
    transform: str
    size: Size | None
    upright: bool
    chunk: Path


def convert(
    source_path: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    transform: str = "none",
    size: Size | None = None,
    max_images: int | None = None,
    upright: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Converted:
    """Make the data set ``dest``, a ZIP if its name ends so and else a folder, of the images in a folder or ZIP.

    ``size`` is (width, height). Files are taken in the order of their sorted names, at most ``max_images`` of them.
    With ``upright`` they are turned first, as their EXIF data say. Labels come from the source's ``dataset.json`` or
    from its top-level folders; if any image lacks one, none is kept (spec 8.1). Raises UserError, naming the files, for
    what cannot be read, and where the results differ in size. An interrupted conversion is continued by the same call.
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
            made_from = (PIL.__version__, transform, size, upright, [(name, source.signature(name)) for name in part])
            chunks.append(staging.chunk(number, made_from))
            if not chunks[-1].exists():
                tasks.append(_Task(source.subset(part), transform, size, upright, chunks[-1]))
        todo = sum(len(task.source.names) for task in tasks)
        bar = tqdm.tqdm(
            total=len(names), initial=len(names) - todo, desc="converting", unit="img", disable=not progress
        )
        damaged: list[str] = []
        with bar:
            for done, errors in in_processes(_convert_chunk, tasks, workers or default_workers()):
                damaged += errors
                bar.update(done)
        if damaged:
            raise UserError(_listed(sorted(damaged)))
        results = [result for chunk in chunks for result in _results(chunk)]
        made = [result for result in results if result.size]
        if not made:
            raise UserError(f"{source.path}: all {len(names)} images are too small for {transform}")
        first = made[0]
        for result in made:
            if result.size != first.size:
                raise UserError(
                    f"{source.path}: {result.name} becomes {_text(result.size)}, but {first.name} {_text(first.size)}; "
                    "a resolution (and a transform) makes all alike"
                )
        staging.finish(
            ((item_name(index), content) for index, content in enumerate(_contents(chunks))),
            lambda: Index(
                None if labels is None else [(item_name(i), labels[result.name]) for i, result in enumerate(made)],
                class_names,
            ),
        )
    kind = "none" if labels is None else "vector" if isinstance(labels[names[0]], list) else "index"
    remarks = [remark] if remark else []
    if lying := [result.name for result in made if result.lying]:
        remarks.append(
            f"{len(lying)} images lie on their side, as their EXIF data say, such as {lying[0]}: --upright turns them"
        )
    return Converted(len(made), len(names) - len(made), first.size, kind, remarks)


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
        top = classes_within(names) if index is None else None
        return None, None, f"the folders in {top}/ are not taken as classes: only those at the top are" if top else ""
    if index is not None and index.labels is not None:
        return dict(index.labels), class_names, ""
    return dict(zip(names, values.tolist(), strict=True)), class_names, ""


def _convert_chunk(task: _Task) -> tuple[int, list[str]]:
    """Convert the images of one chunk, and write it; returns how many there were, and an error for each that cannot be
    decoded. If there is any, nothing is written."""
    transform = make_transform(task.transform, task.size)
    results: list[_Result] = []
    errors: list[str] = []

    def items() -> Iterator[tuple[str, bytes]]:
        for name in task.source.names:
            try:
                picture = decode_rgb(f"{task.source.path}: {name}", task.source.read(name), task.upright)
            except UserError as error:
                errors.append(str(error))
                continue
            image = None if errors else transform(picture.image)
            results.append(_Result(name, image.size if image else None, picture.lying))
            if image:
                yield f"{len(results):08d}.png", encode_png(image)
        if errors:
            raise _Damaged
        yield _RESULTS, json.dumps(results).encode()

    with contextlib.suppress(_Damaged):
        write_chunk(task.chunk, items())
    return len(task.source.names), errors


class _Damaged(Exception):
    """A chunk that is not to be kept."""


def _listed(errors: Sequence[str], most: int = 20) -> str:
    """Errors, one a line."""
    if len(errors) == 1:
        return errors[0]
    more = [f"... and {len(errors) - most} more"] if len(errors) > most else []
    return "\n  ".join([f"{len(errors)} images cannot be read:", *errors[:most], *more])


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _results(chunk: Path) -> list[_Result]:
    found = json.loads(open_chunk(chunk).read(_RESULTS))
    return [_Result(name, tuple(size) if size else None, lying) for name, size, lying in found]


def _contents(chunks: Sequence[Path]) -> Iterator[bytes]:
    for chunk in chunks:
        source = open_chunk(chunk)
        yield from (source.read(name) for name in source.names if name != _RESULTS)
