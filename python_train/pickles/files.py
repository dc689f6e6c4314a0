"""Opening a file of the reference: every refusal names it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from python_train import UserError
from python_train.safe_pickle import Names, Reader, Refused, SourceFile, load


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[SourceFile]:
    """Open a file, and let every refusal name it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        with SourceFile(path) as file:
            yield file
    except Refused as error:
        raise UserError(f"{path} is refused: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error


def read_pickle(file: SourceFile, names: Names) -> Any:
    reader = Reader(file, 0, file.size)
    content = load(reader, names)
    if reader.remaining:
        raise Refused(f"{reader.remaining} bytes follow the end of its pickle")
    return content
