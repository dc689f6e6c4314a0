"""The files of a data set: a folder or a ZIP with ``dataset.json`` (spec 8.1), read as what it is, untrusted input.

Nothing is extracted, no link is followed out of the folder, and no file takes more memory than :data:`MAX_FILE_BYTES`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from python_train import UserError

INDEX = "dataset.json"
MAX_FILE_BYTES = 2**29
MAX_INDEX_BYTES = 2**28
MAX_LABEL_DIM = 2**17
_NUMBERED = re.compile(r"\d{5}/img(-mean-std-)?\d{8}\.\w+")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field


class Problem(NamedTuple):
    """What is wrong with one item of a data set."""

    name: str
    reason: str


def item_name(index: int, suffix: str = ".png", stem: str = "img") -> str:
    """Name of item ``index`` (spec 8.1), e.g. ``00012/img00012345.png``; latents have the stem ``img-mean-std-``."""
    digits = f"{index:08d}"
    return f"{digits[:5]}/{stem}{digits}{suffix}"


# -------------------------------------------------------------------------------------------------------------- files


class _Member(NamedTuple):
    """Where a ZIP keeps a file."""

    offset: int
    packed: int
    size: int
    crc: int
    method: int


class Source:
    """The files of a folder or ZIP that ``wanted`` accepts, and :data:`INDEX`, by name; hidden ones are left out.

    ``names`` are sorted as strings. Files that must not be read (links out of the folder, names that lead out of the
    archive, duplicates, packed by an unknown method, enormous) are not among them but in ``problems``.
    Raises UserError if there is neither a folder nor a readable ZIP. Instances can be pickled.
    """

    def __init__(self, path: str | os.PathLike[str], wanted: Callable[[str], bool]) -> None:
        self.path = Path(path)
        self.problems: list[Problem] = []
        self.members: dict[str, _Member] = {}
        self._file: int | None = None
        if not self.path.exists():
            raise UserError(f"no such data set: {self.path} (give a folder or a ZIP file)")
        if not (self.path.is_dir() or self.path.is_file()):
            raise UserError(f"{self.path} is neither a folder nor a file")
        self.is_zip = not self.path.is_dir()
        found = self._list_zip() if self.is_zip else self._list_folder()
        self.names = sorted(name for name in found if not _is_hidden(name) and (name == INDEX or wanted(name)))
        kept = set(self.names)
        self.members = {name: self.members[name] for name in self.names if self.is_zip}
        self.problems = sorted(p for p in self.problems if p.name in kept or not self.is_zip)
        bad = {problem.name for problem in self.problems}
        self.names = [name for name in self.names if name not in bad]

    def require_sound(self) -> None:
        """Raise UserError, naming the first of them, if there are files that must not be read."""
        if self.problems:
            name, reason = self.problems[0]
            others = f" (and {len(self.problems) - 1} other problems)" if len(self.problems) > 1 else ""
            raise UserError(f"{self.path}: {name} {reason}{others}")

    def subset(self, names: Sequence[str]) -> Source:
        """The same source with only these files: what is handed to another process."""
        part = object.__new__(Source)
        part.path, part.is_zip, part.problems, part._file = self.path, self.is_zip, [], None
        part.names = list(names)
        part.members = {name: self.members[name] for name in names} if self.is_zip else {}
        return part

    def signature(self, name: str) -> tuple[int, ...]:
        """Numbers that change when the file does."""
        if self.is_zip:
            member = self.members[name]
            return (member.offset, member.size, member.crc)
        status = (self.path / name).stat()
        return (status.st_size, status.st_mtime_ns)

    def read(self, name: str, limit: int = MAX_FILE_BYTES) -> bytes:
        """Content of one file. Raises UserError naming it if it cannot be read, is damaged or larger than ``limit``."""
        try:
            content = self._read_member(name, limit) if self.is_zip else self._read_file(name, limit)
        except (OSError, KeyError, ValueError, zlib.error, struct.error) as error:
            raise UserError(f"cannot read {self.path}: {name} ({error})") from error
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    # A folder

    def _list_folder(self) -> Iterator[str]:
        root = os.path.realpath(self.path)
        folders = [""]
        while folders:
            prefix = folders.pop()
            try:
                with os.scandir(os.path.join(root, prefix)) as scan:
                    entries = list(scan)
            except OSError as error:
                raise UserError(f"cannot read the folder {self.path / prefix} ({error.strerror})") from error
            for entry in entries:
                name = prefix + entry.name
                if _is_hidden(entry.name):
                    continue
                if entry.is_symlink() and (reason := _link_problem(entry, root)):
                    self.problems.append(Problem(name, reason))
                elif entry.is_dir():
                    folders.append(name + "/")
                elif not entry.is_file():
                    self.problems.append(Problem(name, "is not a regular file"))
                else:
                    yield name

    def _read_file(self, name: str, limit: int) -> bytes:
        with open(self.path / name, "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise ValueError(f"larger than {limit:,} bytes")
        return content

    # A ZIP: members are read by their position, so that loader processes neither share a file position nor parse the
    # directory of a large archive again.

    def _list_zip(self) -> Iterator[str]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        except Exception as error:  # of a damaged directory: struct.error, UnicodeDecodeError, NotImplementedError, ...
            raise UserError(f"{self.path} is neither a folder nor a readable ZIP file ({error})") from error
        count = Counter(entry.filename for entry in entries)
        for entry in entries:
            name = entry.filename
            if reason := _entry_problem(entry):
                self.problems.append(Problem(name, reason))
            if name not in self.members:
                if count[name] > 1:
                    self.problems.append(Problem(name, f"is in the archive {count[name]} times"))
                place = (entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, entry.compress_type)
                self.members[name] = _Member(*place)
                yield name

    def _read_member(self, name: str, limit: int) -> bytes:
        member = self.members[name]
        if max(member.size, member.packed) > limit:
            raise ValueError(f"{member.size:,} bytes; at most {limit:,} are read")
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(
            os.pread(self._file, _LOCAL_HEADER.size, member.offset)
        )
        if signature != b"PK\x03\x04":
            raise ValueError("the archive's directory points elsewhere")
        content = os.pread(self._file, member.packed, member.offset + _LOCAL_HEADER.size + name_length + extra_length)
        if member.method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, member.size + 1)
        if len(content) != member.size:
            raise ValueError("its size differs from the one in the archive's directory")
        if zlib.crc32(content) != member.crc:
            raise ValueError("its checksum differs from the one in the archive's directory")
        return content


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts)


def _link_problem(entry: os.DirEntry[str], root: str) -> str | None:
    target = os.path.realpath(entry.path)
    if not os.path.exists(target):
        return "is a link to nothing"
    if os.path.commonpath([root, target]) != root:
        return "is a link out of the folder, which is not followed"
    if os.path.isdir(target):
        return "is a link to a folder, which is not followed"
    return None


def _entry_problem(entry: zipfile.ZipInfo) -> str | None:
    path = PurePosixPath(entry.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", entry.filename):
        return "has a name that leads out of the archive"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link, which is not followed"
    if entry.flag_bits & 0x1:
        return "is encrypted"
    if entry.compress_type not in _METHODS:
        return f"is packed by method {entry.compress_type}; only stored and deflated files are read"
    if max(entry.file_size, entry.compress_size) > MAX_FILE_BYTES:
        return f"has {entry.file_size:,} bytes; at most {MAX_FILE_BYTES:,} are read"
    return None


# ------------------------------------------------------------------------------------------------------- dataset.json


@dataclasses.dataclass
class Statistics:
    """Mean and standard deviation of each channel over a data set: of pixels in 0..255, or of raw latents, one random
    sample of each posterior counted with its variance."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        self.mean, self.std = tuple(map(float, self.mean)), tuple(map(float, self.std))
        if len(self.mean) != len(self.std) or not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise ValueError("mean and std must be as many finite numbers, std positive")

    def to_json(self) -> dict[str, Any]:
        return {"mean": list(self.mean), "std": list(self.std)}


@dataclasses.dataclass
class Index:
    """What ``dataset.json`` says: ``labels`` as [name, label] pairs (spec 8.1), and our optional additions: the names
    of the classes, the statistics of the channels, and where the data comes from."""

    labels: list[tuple[str, Any]] | None = None
    class_names: list[str] | None = None
    statistics: Statistics | None = None
    about: str | None = None

    def to_json(self) -> str:
        """The file's content; keys without a value are left out, except ``labels``."""
        content: dict[str, Any] = {"labels": self.labels}
        if self.class_names is not None:
            content["class_names"] = self.class_names
        if self.statistics is not None:
            content["statistics"] = self.statistics.to_json()
        if self.about is not None:
            content["about"] = self.about
        return json.dumps(content)


def read_index(source: Source) -> Index | None:
    """The source's ``dataset.json``, None if it has none. Raises UserError, saying what was expected, if it is not."""
    if INDEX not in source.names:
        return None
    text = source.read(INDEX, MAX_INDEX_BYTES)
    try:
        content = json.loads(text)
        labels, class_names, statistics = content["labels"], content.get("class_names"), content.get("statistics")
        if labels is not None:
            labels = [(str(name).replace("\\", "/"), label) for name, label in labels]
        if class_names is not None and not (
            isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)
        ):
            raise ValueError("class_names must be a list of strings")
        if statistics is not None:
            statistics = Statistics(tuple(statistics["mean"]), tuple(statistics["std"]))
        about = content.get("about")
        return Index(labels, class_names, statistics, about if isinstance(about, str) else None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{source.path}: {INDEX} must be {{"labels": [[filename, label], ...]}} or null ({error!r})'
        ) from error


# ------------------------------------------------------------------------------------------------------------- labels


class Labels(NamedTuple):
    """Labels of a list of items: class numbers [N] int64, vectors [N, label_dim] float32, or None; names of the
    classes or of the components of multi-hot vectors; what is wrong with which item."""

    values: np.ndarray | None
    class_names: list[str] | None
    problems: list[Problem]


def find_labels(names: Sequence[str], index: Index | None) -> Labels:
    """Labels of the items ``names``: from ``dataset.json`` if there is one, else from their top-level folders if there
    are several, sorted (spec 8.2, 8.3). The container's own numbered folders are no classes."""
    if index is not None:
        return Labels(None, None, []) if index.labels is None else _labels_of_index(names, index)
    folders = [PurePosixPath(name).parts[0] if "/" in name else None for name in names]
    classes = sorted({folder for folder in folders if folder is not None})
    if len(classes) < 2 or all(_NUMBERED.fullmatch(name) for name in names):
        return Labels(None, None, [])
    text = f"is in none of the class folders ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
    problems = [Problem(name, text) for name, folder in zip(names, folders, strict=True) if folder is None]
    number = {name: i for i, name in enumerate(classes)}
    return Labels(np.array([number.get(folder, -1) for folder in folders], dtype=np.int64), classes, problems)


def classes_within(names: Sequence[str]) -> str | None:
    """The one top-level folder that holds all items, if its own folders look like classes a level too deep."""
    parts = [PurePosixPath(name).parts for name in names]
    tops, folders = {part[0] for part in parts}, {part[1] for part in parts if len(part) > 2}
    if len(tops) == 1 and len(folders) > 1 and not any(_NUMBERED.search(name) for name in names):
        return tops.pop()
    return None


def _labels_of_index(names: Sequence[str], index: Index) -> Labels:
    by_name, problems = dict(index.labels or []), []
    if len(by_name) < len(index.labels or []):
        count = Counter(name for name, _ in index.labels or [])
        problems = [Problem(name, f"is in {INDEX} {n} times") for name, n in count.items() if n > 1]
    given = [by_name.get(name) for name in names]
    widths = Counter(len(label) for label in given if isinstance(label, list))
    numbers = sum(isinstance(label, int) for label in given)
    width = widths.most_common(1)[0][0] if widths and widths.total() > numbers else None
    limit = MAX_LABEL_DIM if index.class_names is None else len(index.class_names)
    for name, label in zip(names, given, strict=True):
        if reason := ("has no label" if name not in by_name else _label_problem(label, width, limit)):
            problems.append(Problem(name, reason))
    bad = {problem.name for problem in problems}
    sound = [label for name, label in zip(names, given, strict=True) if name not in bad]
    fallback: Any = -1 if width is None else [0.0] * width
    values = np.array(
        sound if not bad else [fallback if name in bad else by_name[name] for name in names],
        dtype=np.int64 if width is None else np.float32,
    )
    return Labels(values, index.class_names, problems)


def _label_problem(label: Any, width: int | None, limit: int) -> str | None:
    if width is None:
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < limit:
            return None
        return f"has the label {_short(label)}; expected a class number from 0 to {limit - 1}"
    largest = float(np.finfo(np.float32).max)
    number = (int, float)
    if (
        isinstance(label, list)
        and len(label) == width
        and 0 < width <= MAX_LABEL_DIM
        and all(isinstance(v, number) and not isinstance(v, bool) and -largest <= v <= largest for v in label)
    ):
        return None
    return f"has the label {_short(label)}; expected {width} finite numbers, as vectors must all have one length"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + " ..."


# ------------------------------------------------------------------------------------------------------------ writing


def write_zip(path: Path, items: Iterable[tuple[str, bytes]]) -> None:
    """Write a ZIP of uncompressed files to ``path``: the same bytes whenever the items are the same."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in items:
            archive.writestr(zipfile.ZipInfo(name), content)


def write_folder(path: Path, items: Iterable[tuple[str, bytes]]) -> None:
    """Write files into the new folder ``path``."""
    path.mkdir()
    for name, content in items:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
