"""Folders of torch.distributed.checkpoint: tensors are read, and nothing is executed."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from python_train import UserError
from python_train.dcp_index import TensorReader


def save(folder: Path, state: dict[str, object]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is of one process
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))
    return folder


def load(folder: Path, state: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=TensorReader(folder))


@pytest.fixture
def state() -> dict[str, object]:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)
    return {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}


def test_tensors(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    folder = save(tmp_path / "state", state)
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load(folder, found)
    assert all(torch.equal(found[name], state[name]) for name in state)


class Harm:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


def test_an_index_that_would_do_something(tmp_path: Path, state: dict[str, object]) -> None:
    folder = save(tmp_path / "state", state)
    (folder / ".metadata").write_bytes(pickle.dumps(Harm(tmp_path / "done")))
    with pytest.raises(UserError, match=rf"{folder} is not a training state of this program: it asks for \w+\.system"):
        TensorReader(folder).read_metadata()
    assert not (tmp_path / "done").exists()


def test_objects_are_refused(tmp_path: Path, state: dict[str, object]) -> None:
    folder = save(tmp_path / "state", {**state, "more": Harm(tmp_path / "done")})
    with pytest.raises(UserError, match="BytesStorageMetadata"):
        TensorReader(folder).read_metadata()
    assert not (tmp_path / "done").exists()


def test_files_elsewhere_are_refused(tmp_path: Path, state: dict[str, object]) -> None:
    folder = save(tmp_path / "state", state)
    index = folder / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../" + place.relative_path
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="is outside of it"):
        TensorReader(folder).read_metadata()


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\x80\x04K\x01.", b"junk"])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="is not a training state of this program"):
        TensorReader(tmp_path).read_metadata()
