"""Files by path or by URL: what is at a URL is downloaded once and kept."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import urllib.parse
import urllib.request
from pathlib import Path

from python_train import UserError
from python_train.checkpoint import atomic_write

_URL = re.compile(r"[a-z]+://", re.IGNORECASE)


def is_url(source: str) -> bool:
    """Whether it is a URL, not a path."""
    return _URL.match(source) is not None


def cache_folder() -> Path:
    """Where downloads are kept: ``edm2ext`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edm2ext"


def local_file(source: str | os.PathLike[str]) -> Path:
    """The file that ``source`` names: a path, or a URL, which is downloaded the first time, under its own name.

    Raises UserError if it is not there, or cannot be fetched whole.
    """
    text = os.fspath(source)
    if not is_url(text):
        if not Path(text).is_file():
            raise UserError(f"no such file of weights: {text}")
        return Path(text)
    name = Path(urllib.parse.urlparse(text).path).name or "weights"
    path = cache_folder() / hashlib.sha256(text.encode()).hexdigest()[:8] / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            urllib.request.urlopen(text, timeout=60) as response,
            atomic_write(path) as temporary,
            open(temporary, "wb") as file,
        ):
            shutil.copyfileobj(response, file, 2**20)
            expected = response.headers.get("Content-Length")
            if expected is not None and file.tell() != int(expected):
                raise UserError(f"{text} broke off after {file.tell()} of {expected} bytes; try again")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{text} cannot be fetched ({error}); fetch it yourself and name the file instead") from error
    return path
