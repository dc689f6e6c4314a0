"""NumPy's arrays and numbers in a file of the reference, of its old and new layouts."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from python_train.pickles.tensors import integers
from python_train.safe_pickle import Blob, Buildable, Names, Refused, StandIn


class _NumpyType(Buildable):
    """``numpy.dtype(...)``: numbers of the usual sizes, little-endian."""

    def __init__(self, name: Any, *_: Any) -> None:
        if not isinstance(name, str) or re.fullmatch(r"[fiu][1248]|b1", name) is None or name == "f1":
            raise Refused("an array in it is not of plain numbers")
        self.dtype = np.dtype(f"<{name}")

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 8 or state[1] not in ("<", "|", "="):
            raise Refused("an array in it is not little-endian")
        if any(part is not None for part in state[2:5]):
            raise Refused("an array in it has sub-types")


class NumpyArray(Buildable):
    """``numpy._core.multiarray._reconstruct(...)`` and the state it gets."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _NumpyType):
            raise Refused("an array in it has no shape and type")
        shape, dtype, fortran, content = integers(state[1]), state[2].dtype, state[3], state[4]
        if min(shape, default=1) < 1 or math.prod(shape) * dtype.itemsize != _length(content):
            raise Refused(f"an array of shape {list(shape)} in it does not have {dtype} numbers for it")
        flat = np.frombuffer(_bytes(content), dtype)
        self.value = flat.reshape(shape, order="F" if fortran is True else "C")


def _numpy_scalar(kind: Any, content: Any) -> float | int | bool:
    if not isinstance(kind, _NumpyType) or _length(content) != kind.dtype.itemsize:
        raise Refused("a NumPy number in it has no type or no value")
    return np.frombuffer(_bytes(content), kind.dtype)[0].item()


def _length(content: Any) -> int:
    return content.length if isinstance(content, Blob) else len(content) if isinstance(content, bytes) else -1


def _bytes(content: Any) -> bytes:
    return content.read() if isinstance(content, Blob) else content


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """``_codecs.encode``: how pickles before protocol 3 write bytes."""
    if not isinstance(text, str) or len(text) > 1024 or encoding != "latin1":
        raise Refused("bytes in it are not written as a short latin1 text")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise Refused("bytes in it are not written as latin1 text") from error


NUMPY: Names = {
    **{
        (module, name): stand_in
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2
        for name, stand_in in {
            "_reconstruct": StandIn(call=NumpyArray, counts=(3,)),
            "scalar": StandIn(call=_numpy_scalar, counts=(2,)),
        }.items()
    },
    ("numpy", "ndarray"): StandIn(),
    ("numpy", "dtype"): StandIn(call=_NumpyType, counts=(1, 3)),
    ("_codecs", "encode"): StandIn(call=_encode, counts=(1, 2)),
}
