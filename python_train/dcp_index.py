"""Folders of torch.distributed.checkpoint read as data: their index is a pickle, a program, which could do anything.

Here it may ask for the few names that an index of tensors needs, and nothing else. The tensors' own files are read with
``weights_only=True`` by torch.
"""

from __future__ import annotations

import pickle
from pathlib import PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from python_train import UserError

_METADATA = (
    "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_NAMES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # as Python 3.13 writes it
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class TensorReader(FileSystemReader):
    """Reads a folder that holds tensors and nothing else, of whatever origin.

    Raises UserError, naming the folder, where its index asks for anything else than an index of tensors does.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with open(self.path / ".metadata", "rb") as file:
                metadata = _Index(file).load()
            for name, entry in metadata.state_dict_metadata.items():
                if type(entry) is not TensorStorageMetadata:
                    raise ValueError(f"{name} is no tensor")  # anything else would be unpickled
            for place in metadata.storage_data.values():
                if PurePath(place.relative_path).name != place.relative_path:
                    raise ValueError(f"{place.relative_path} is outside of it")
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
        except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, EOFError, OSError) as error:
            raise UserError(f"{self.path} is not a training state of this program: {error}") from error
        return metadata
