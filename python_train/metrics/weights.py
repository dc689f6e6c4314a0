"""Weights of feature networks, read without executing anything in them."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from python_train import UserError
from python_train.pickles.metrics import read_feature_network
from python_train.pickles.zip_file import is_script


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name: ``.safetensors``, a ``.pth`` of plain tensors, or a network as it was
    pickled by the programs of StyleGAN or saved as TorchScript (`python_train.pickles.metrics.read_feature_network`).

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
