"""Weights of feature networks, from a file or a URL, read without executing anything in them."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import urllib.parse
import urllib.request
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from python_train import UserError
from python_train.checkpoint import atomic_write
from python_train.official import is_script, read_feature_network

_URL = re.compile(r"[a-z]+://", re.IGNORECASE)


def cache_folder() -> Path:
    """Where downloads are kept: ``edm2ext`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edm2ext"


def local_file(source: str | os.PathLike[str]) -> Path:
    """The file that ``source`` names: a path, or a URL, which is downloaded the first time.

    Raises UserError if it is not there, or cannot be fetched whole.
    """
    text = os.fspath(source)
    if not _URL.match(text):
        if not Path(text).is_file():
            raise UserError(f"no such file of weights: {text}")
        return Path(text)
    name = Path(urllib.parse.urlparse(text).path).name or "weights"
    path = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-{name}"
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
        raise UserError(f"{text} cannot be fetched ({error}); fetch it yourself and name the file") from error
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name: ``.safetensors``, a ``.pth`` of plain tensors, or a network as it was
    pickled by the programs of StyleGAN or saved as TorchScript (:func:`python_train.official.read_feature_network`).

    Raises UserError, naming the file, if it is damaged or something else.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".pkl" or is_script(path):
            return read_feature_network(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that torch did not write
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is damaged, or not a file of weights ({reason})") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} is not a state dict: names with tensors")
    return content


def digest(net: torch.nn.Module) -> str:
    """sha256 of all weights, to tell whether two sets of features are of one network."""
    result = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        result.update(name.encode())
        result.update(value.detach().cpu().contiguous().numpy().tobytes())
    return result.hexdigest()
