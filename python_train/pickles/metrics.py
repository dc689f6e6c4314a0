"""Pickled feature networks and reference files of the metrics (spec 7)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from python_train.pickles.arrays import NumpyArray
from python_train.pickles.files import read_pickle, reading
from python_train.pickles.objects import (
    MAX_DEPTH,
    MAX_MEMBERS,
    MAX_TENSORS,
    PLAIN,
    SNAPSHOT,
    Module,
    modules_of,
    tensors_of,
)
from python_train.pickles.tensors import STORAGE_TYPES, StoredTensor
from python_train.pickles.zip_file import read_zip
from python_train.safe_pickle import Names, Refused, StandIn

_NETWORK: Names = {
    **SNAPSHOT,
    **STORAGE_TYPES,
    **{
        ("torch.jit._pickle", f"build_{kind}list"): StandIn(call=lambda values: values, counts=(1,))
        for kind in ("int", "double", "bool", "tensor")
    },
}


class _AnyNetwork(Mapping[tuple[str, str], StandIn]):
    """The names in a pickled network: any class of torch.nn or of a script stands for an inert :class:`Module`."""

    def __getitem__(self, key: tuple[str, str]) -> StandIn:
        if key in _NETWORK:
            return _NETWORK[key]
        if key[0].startswith(("torch.nn.modules.", "__torch__.")) or key[0] == "__torch__":
            return StandIn(new=lambda: Module(key[1]))
        raise KeyError(key)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(_NETWORK)

    def __len__(self) -> int:
        return len(_NETWORK)


def read_feature_network(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict of a feature network, pickled as a persistent object (spec 9.2) or saved as TorchScript.

    The code in the file is not looked at. Raises UserError, naming the file, for anything else.
    """
    path = Path(path)
    with reading(path) as file:
        zipped = file.read_at(0, min(4, file.size)) == b"PK\3\4"
        net = read_zip(file, _AnyNetwork()) if zipped else read_pickle(file, _AnyNetwork())
        if not isinstance(net, Module):
            raise Refused("it holds no network")
        tensors = _script_tensors(net) if zipped else tensors_of(modules_of(net))
        if sum(tensor.nbytes for tensor in tensors.values()) > file.size:
            raise Refused("its tensors are the same numbers several times")
    return {name: tensor.read() for name, tensor in tensors.items()}


def _script_tensors(net: Module) -> dict[str, StoredTensor]:
    """The tensors of a script: attributes of its modules, which are attributes of each other."""
    tensors: dict[str, StoredTensor] = {}
    visited: set[int] = set()

    def visit(prefix: str, module: Module) -> None:
        if id(module) in visited or prefix.count(".") > MAX_DEPTH or len(module.state) > MAX_MEMBERS:
            raise Refused("its modules contain each other, one is used twice, or there are too many")
        visited.add(id(module))
        for name, value in module.state.items():
            if isinstance(value, Module):
                visit(f"{prefix}{name}.", value)
            elif isinstance(value, StoredTensor):
                tensors[f"{prefix}{name}"] = value
            if len(tensors) > MAX_TENSORS:
                raise Refused("it has too many tensors")

    visit("", net)
    return tensors


def read_metric_reference(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The pickled reference of the metrics (spec 7): numbers, and dictionaries of float64 arrays.

    Raises UserError, naming the file, for anything else.
    """
    path = Path(path)
    with reading(path) as file:
        content = read_pickle(file, PLAIN)
        if not isinstance(content, dict):
            raise Refused("it is not a dictionary")
        return {
            key: {name: _array(array) for name, array in value.items()} if isinstance(value, dict) else value
            for key, value in content.items()
        }


def _array(array: Any) -> Any:
    if isinstance(array, NumpyArray) and array.value is not None and array.value.dtype.kind == "f":
        return array.value.astype(np.float64)
    if type(array) in (int, float):
        return array
    raise Refused("it holds something else than numbers and arrays of them")
