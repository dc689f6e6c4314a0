"""A checksum inside of a safetensors file: the SHA-256 of the whole file, computed with zeros in its own place."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import BinaryIO

KEY = "sha256"  # of the metadata
NONE_YET = "0" * 64
_PLACE = re.compile(rb'"sha256": "([0-9a-f]{64})"')  # within values quotes are escaped


class SealedWriter:
    """Writes a file whose ``head``, the beginning up to the tensors, has NONE_YET under KEY in its metadata."""

    def __init__(self, file: BinaryIO, head: bytes) -> None:
        self.file = file
        self.place = _PLACE.search(head).start(1)  # type: ignore[union-attr]
        self.digest = hashlib.sha256()
        self.write(head)

    def write(self, content: bytes | memoryview) -> None:
        """Append some of the file."""
        self.digest.update(content)
        self.file.write(content)

    def seal(self) -> None:
        """Put the checksum in its place, after all is written."""
        self.file.seek(self.place)
        self.file.write(self.digest.hexdigest().encode())


def is_intact(path: Path) -> bool | None:
    """Whether no bit of a sealed file has changed; None for a file without a checksum. Reads all of it."""
    with open(path, "rb") as file:
        head = file.read(8)
        head += file.read(int.from_bytes(head, "little"))
        stored = _PLACE.search(head)
        if stored is None:
            return None
        digest = hashlib.sha256(head[: stored.start(1)] + NONE_YET.encode() + head[stored.end(1) :])
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest().encode() == stored[1]
