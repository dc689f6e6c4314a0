"""The zip files of torch: training states and scripts."""

from __future__ import annotations

import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

from python_train.pickles.tensors import Storage, storage_id
from python_train.safe_pickle import Names, Reader, Refused, SourceFile, load

_MEMBER = re.compile(r"/(data\.pkl|data/[^/]+|byteorder)$")


def read_zip(file: SourceFile, names: Names) -> Any:
    """The object in a zip file of torch: ``data.pkl`` and a member for each storage, none of them compressed. Other
    members, such as the code of a script, are not looked at."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = {info.filename: info for info in archive.infolist() if _MEMBER.search(info.filename)}
            if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in members.values()):
                raise Refused("it has compressed or encrypted members")
            if sum(info.file_size for info in members.values()) > file.size:
                raise Refused("its members claim more bytes than it has")
            for info in members.values():
                _check_sum(archive, info)
    except Refused:
        raise
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, OSError, struct.error) as error:
        raise Refused(f"it is not a zip file of torch, or damaged ({error})") from error
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused("it is not a zip file of torch: there is not one data.pkl in it")
    root = roots[0]
    if (order := members.get(f"{root}byteorder")) is not None and file.read_at(*_extent(file, order)) != b"little":
        raise Refused("its numbers are not little-endian")

    def storage(value: Any) -> Storage:
        dtype, key, count = storage_id(value)
        info = members.get(f"{root}data/{key}")
        if info is None or info.file_size != count * dtype.itemsize:
            raise Refused(f"a storage in it claims {count} numbers of {dtype}, which are not there")
        return Storage(Path(file.path), dtype, _extent(file, info)[0], count)

    start, size = _extent(file, members[f"{root}data.pkl"])
    return load(Reader(file, start, start + size), names, storage)


def _check_sum(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Refused unless a member is there as its checksum says."""
    try:
        with archive.open(info) as content:
            while content.read(2**20):
                pass
    except zipfile.BadZipFile as error:
        raise Refused(f"{info.filename[:80]!r} in it does not match its checksum") from error


def _extent(file: SourceFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of an uncompressed member lie: (start, size)."""
    header = file.read_at(info.header_offset, 30)
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if header[:4] != b"PK\3\4" or start + info.file_size > file.size:
        raise Refused("a member of it does not lie in it")
    return start, info.file_size


def is_script(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a network saved as TorchScript: a zip file of torch with code in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, struct.error):
        return False
