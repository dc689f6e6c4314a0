"""Training images: embedded digits, image folders and ZIPs (spec 8.1, 8.2); encoders (1.1, 1.2); data order (4.7)."""

from __future__ import annotations

import abc
import io
import itertools
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
import tqdm
from torch import Tensor

from python_train import UserError
from python_train.rng import epoch_order

DIGITS = "digits"
IN_MEMORY_BYTES = 2**30
SIGMA_DATA = 0.5
# Channel statistics of sd-vae-ft-mse posterior means over ImageNet-512 (spec 1.2).
VAE_MEAN = (5.81, 3.25, 0.12, -2.15)
VAE_STD = (4.17, 4.62, 3.71, 3.28)


# ---------------------------------------------------------------------------------------------------------- encoders


class Encoder(Protocol):
    """Maps stored arrays to the network's domain and back; :func:`open_encoder` rebuilds it from its ``facts()``."""

    def encode(self, stored: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...

    def facts(self) -> dict[str, Any]: ...


class PixelEncoder:
    """Full-range uint8 images: ``z = p / 127.5 - 1`` (spec 1.1)."""

    def encode(self, stored: Tensor) -> Tensor:
        """uint8 [N, C, H, W] to float32 in [-1, 1]."""
        return stored.to(torch.float32) / 127.5 - 1

    def decode(self, z: Tensor) -> Tensor:
        """Float [N, C, H, W] to uint8, truncating ``z * 127.5 + 128``; exact on every encoded value."""
        return (z.to(torch.float32) * 127.5 + 128).clip(0, 255).to(torch.uint8)

    def facts(self) -> dict[str, Any]:
        return {"kind": "pixel"}


class StandardizedEncoder:
    """uint8 images of unusual statistics, shifted to mean 0 and scaled to standard deviation sigma_data = 0.5."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean = mean
        self.std = std

    def encode(self, stored: Tensor) -> Tensor:
        """uint8 [N, C, H, W] to float32 with the data set's mean 0 and std 0.5."""
        return (stored.to(torch.float32) - self.mean) * (SIGMA_DATA / self.std)

    def decode(self, z: Tensor) -> Tensor:
        """Float [N, C, H, W] to uint8, rounding; exact on every encoded value."""
        return (z.to(torch.float32) * (self.std / SIGMA_DATA) + (self.mean + 0.5)).clip(0, 255).to(torch.uint8)

    def facts(self) -> dict[str, Any]:
        return {"kind": "standardized", "mean": self.mean, "std": self.std}


class LatentEncoder:
    """VAE posteriors stored as mean and std [N, 2C, H, W] float32: a fresh sample, whitened to std 0.5 (spec 1.2)."""

    def __init__(self, mean: tuple[float, ...] = VAE_MEAN, std: tuple[float, ...] = VAE_STD) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)

    def _affine(self, device: torch.device) -> tuple[Tensor, ...]:
        scale = np.float32(SIGMA_DATA) / np.float32(self.std)
        bias = np.float32(0) - np.float32(self.mean) * scale
        return tuple(torch.from_numpy(value).to(device).reshape(1, -1, 1, 1) for value in (scale, bias))

    def encode(self, stored: Tensor) -> Tensor:
        """One posterior sample per image, drawn from the device's global generator: [N, C, H, W] float32."""
        mean, std = stored.to(torch.float32).chunk(2, dim=1)
        scale, bias = self._affine(stored.device)
        return (mean + std * torch.randn_like(mean)) * scale + bias

    def decode(self, z: Tensor) -> Tensor:
        """Undo the whitening: the VAE's own latents [N, C, H, W] float32 (making pixels of them takes the VAE)."""
        scale, bias = self._affine(z.device)
        return (z.to(torch.float32) - bias) / scale

    def facts(self) -> dict[str, Any]:
        return {"kind": "latent", "mean": list(self.mean), "std": list(self.std)}


def open_encoder(facts: dict[str, Any]) -> Encoder:
    """The encoder described by ``facts`` (as found in a snapshot's header). Raises UserError if the kind is unknown."""
    kinds = {"pixel": PixelEncoder, "standardized": StandardizedEncoder, "latent": LatentEncoder}
    arguments = dict(facts)
    kind = arguments.pop("kind", None)
    if kind not in kinds:
        raise UserError(f"unknown encoder kind {kind!r}; known are {', '.join(kinds)}")
    return kinds[kind](**arguments)


# ---------------------------------------------------------------------------------------------------------- data sets


class Dataset(abc.ABC):
    """Images of one shape with optional labels. Sub-classes say how item i is read.

    Attributes: ``name``, ``num_images``, ``channels`` (as stored), ``resolution``, ``label_dim`` (0 = no labels) and
    ``class_names`` (empty for vector labels). ``dataset[i]`` is ``(stored array [C, H, W], float32 [label_dim])``.
    """

    def __init__(self, name: str, path: str, labels: np.ndarray | None, class_names: list[str] | None = None) -> None:
        self.name = name
        self.path = path
        self.labels = labels
        if labels is None:
            self.label_dim = 0
        else:
            self.label_dim = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
        has_classes = labels is not None and labels.ndim == 1
        self.class_names = (class_names or [str(i) for i in range(self.label_dim)]) if has_classes else []
        first = self.read(0)
        self.num_images = self._count()
        self.dtype = first.dtype
        self.channels, self.resolution = first.shape[0], first.shape[1]
        self.shape = first.shape
        self.in_memory: tuple[Tensor, Tensor] | None = None

    @abc.abstractmethod
    def _count(self) -> int:
        """Number of images."""

    @abc.abstractmethod
    def read(self, index: int) -> np.ndarray:
        """The stored array [C, H, W] of one image."""

    def label(self, index: int) -> np.ndarray:
        """Label of one image as float32 [label_dim]: one-hot for class labels, the vector itself otherwise."""
        if self.labels is None:
            return np.zeros([0], dtype=np.float32)
        if self.labels.ndim == 2:
            return self.labels[index]
        one_hot = np.zeros([self.label_dim], dtype=np.float32)
        one_hot[self.labels[index]] = 1
        return one_hot

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.read(index), self.label(index)

    def preload(self, progress: bool = False) -> None:
        """Read everything now, and keep it, if it fits in memory: a damaged image shows before anything starts."""
        if self.num_images * np.prod(self.shape) * self.dtype.itemsize <= IN_MEMORY_BYTES:
            self.in_memory = self.load_all(progress)

    def load_all(self, progress: bool = False) -> tuple[Tensor, Tensor]:
        """Every image [N, C, H, W] in the stored dtype and every label [N, label_dim] float32."""
        bar = tqdm.tqdm(range(self.num_images), desc="reading images", unit="img", disable=not progress, leave=False)
        images = np.empty([self.num_images, *self.shape], self.dtype)
        for index in bar:
            images[index] = self.read(index)
        labels = np.stack([self.label(index) for index in range(self.num_images)])
        return torch.from_numpy(images), torch.from_numpy(labels)

    def encoder(self) -> Encoder:
        """The encoder that takes this data set to the network's domain."""
        return LatentEncoder() if self.dtype == np.float32 else PixelEncoder()

    def facts(self) -> dict[str, Any]:
        """What a snapshot's header says of the data it was trained on."""
        return {
            "name": self.name,
            "path": self.path,
            "num_images": self.num_images,
            "resolution": self.resolution,
            "channels": self.channels,
            "label_dim": self.label_dim,
            "class_names": self.class_names,
        }


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits: uint8 [1, 8, 8], the values 0..16 spread over 0..255, ten classes."""

    def __init__(self, cond: bool = True) -> None:
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        self.images = np.rint(values.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
        super().__init__(DIGITS, DIGITS, labels.astype(np.int64) if cond else None)

    def _count(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def encoder(self) -> Encoder:
        return StandardizedEncoder(round(float(self.images.mean()), 4), round(float(self.images.std()), 4))


class ImageArchive(Dataset):
    """A folder or ZIP of images, or of .npy arrays of VAE latents (spec 8.1, 8.2).

    Labels come from ``dataset.json`` if there is one, else from the top-level folders' names if there are several.
    Raises UserError, naming the file, for an empty archive, unreadable or unequal images, and labels that are
    missing or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str], cond: bool = True) -> None:
        self.archive = Path(path)
        self.is_zip = self.archive.is_file()
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        self.names = [name for name in self._list() if _is_image(name)]
        if not self.names:
            raise UserError(f"no images (.png, .jpg, ... or .npy) in {self.archive}")
        self._first_shape: tuple[int, ...] | None = None
        labels, class_names = self._read_labels() if cond else (None, None)
        super().__init__(self.archive.stem, str(self.archive), labels, class_names)

    def _count(self) -> int:
        return len(self.names)

    def _list(self) -> list[str]:
        if self.is_zip:
            names = [item.filename for item in self._open_zip().infolist() if not item.is_dir()]
        else:
            names = [path.relative_to(self.archive).as_posix() for path in self.archive.rglob("*") if path.is_file()]
        return sorted(names)

    def _open_zip(self) -> zipfile.ZipFile:
        """The ZIP, opened once per process: a forked loader process must not share a file position."""
        if self._zip is None or self._zip[0] != os.getpid():
            try:
                self._zip = (os.getpid(), zipfile.ZipFile(self.archive))
            except (
                Exception
            ) as error:  # of a damaged directory: struct.error, UnicodeDecodeError, NotImplementedError, ...
                raise UserError(f"{self.archive} is neither a folder nor a readable ZIP file ({error})") from error
        return self._zip[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    def _bytes(self, name: str) -> bytes:
        try:
            return self._open_zip().read(name) if self.is_zip else (self.archive / name).read_bytes()
        except (
            Exception
        ) as error:  # a damaged archive raises many kinds: zlib.error, EOFError, NotImplementedError, ...
            raise UserError(f"cannot read {self.archive}: {name} ({error})") from error

    def read(self, index: int) -> np.ndarray:
        name = self.names[index]
        image = _decode_image(f"{self.archive}: {name}", name, self._bytes(name))
        if self._first_shape is None:
            self._first_shape = image.shape
            self._first_dtype = image.dtype
        if image.shape != self._first_shape or image.dtype != self._first_dtype:
            raise UserError(
                f"{self.archive}: {name} is {_describe(image.shape, image.dtype)} but {self.names[0]} is "
                f"{_describe(self._first_shape, self._first_dtype)}; all images must be alike"
            )
        return image

    def _read_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        if "dataset.json" in self._list():
            return self._labels_from_json(), None
        folders = [PurePosixPath(name).parts[0] if "/" in name else None for name in self.names]
        numbered = all(re.fullmatch(r"\d{5}/img(-mean-std-)?\d{8}\.\w+", name) for name in self.names)
        classes = sorted({folder for folder in folders if folder is not None})
        if len(classes) < 2 or numbered:  # numbered folders are the container's own layout, not classes
            return None, None
        if None in folders:
            name = self.names[folders.index(None)]
            raise UserError(f"{self.archive} has class folders ({', '.join(classes[:3])}, ...) but {name} is in none")
        return np.array([classes.index(folder) for folder in folders], dtype=np.int64), classes  # type: ignore

    def _labels_from_json(self) -> np.ndarray | None:
        where = f"{self.archive}: dataset.json"
        try:
            entries = json.loads(self._bytes("dataset.json"))["labels"]
            if entries is None:
                return None
            by_name = {str(name).replace("\\", "/"): label for name, label in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{where} must be {{"labels": [[filename, label], ...]}} or null ({error!r})') from error
        missing = [name for name in self.names if name not in by_name]
        if missing:
            raise UserError(f"{where} has no label for {len(missing)} of {len(self.names)} images, e.g. {missing[0]}")
        values = [by_name[name] for name in self.names]
        if all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
            return np.array(values, dtype=np.int64)
        try:
            vectors = np.array(values, dtype=np.float32)
        except (ValueError, TypeError):
            vectors = np.empty([0])
        if vectors.ndim != 2 or vectors.shape[1] == 0 or not np.isfinite(vectors).all():
            raise UserError(f"{where}: labels must be all class numbers >= 0, or all vectors of one length")
        return vectors


def _is_image(name: str) -> bool:
    if any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts):
        return False
    PIL.Image.init()
    suffix = PurePosixPath(name).suffix.lower()
    return suffix == ".npy" or suffix in PIL.Image.EXTENSION


def _describe(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' * (shape[0] > 1)} {dtype}"


def _decode_image(where: str, name: str, data: bytes) -> np.ndarray:
    """Bytes of an image file or .npy to [C, H, W]: uint8 with 1..4 channels, or float32 with 8 (VAE mean and std)."""
    try:
        if name.lower().endswith(".npy"):
            array = np.load(io.BytesIO(data), allow_pickle=False)
            array = array.reshape(-1, *array.shape[-2:])
        else:
            with PIL.Image.open(io.BytesIO(data)) as image:
                if image.mode in ("1", "P", "PA"):
                    image = image.convert({"1": "L", "P": "RGB", "PA": "RGBA"}[image.mode])
                array = np.asarray(image)
            array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    except Exception as error:  # Pillow and NumPy raise many kinds for a damaged file
        raise UserError(f"{where} cannot be decoded; the file is damaged or of an unknown kind ({error})") from error
    if array.dtype == np.uint8 and 1 <= array.shape[0] <= 4:
        return np.ascontiguousarray(array)
    if array.dtype == np.float32 and array.shape[0] == 2 * len(VAE_MEAN):
        return np.ascontiguousarray(array)
    raise UserError(
        f"{where} has {array.shape[0]} channels of {array.dtype}; expected 1 to 4 of uint8, or 8 of float32 "
        "(mean and standard deviation of VAE latents)"
    )


def open_dataset(name_or_path: str | os.PathLike[str] = DIGITS, cond: bool = True) -> Dataset:
    """The embedded ``"digits"`` or an image folder / ZIP. ``cond=False`` ignores labels.

    Raises UserError if it is missing, empty or damaged, if images are not square, or if labels were asked for but
    there are none.
    """
    if str(name_or_path) == DIGITS:
        return Digits(cond)
    path = Path(name_or_path)
    if not path.exists():
        raise UserError(f"no such data set: {path} (give a folder, a ZIP file, or '{DIGITS}')")
    dataset = ImageArchive(path, cond)
    height, width = dataset.shape[1:]
    if height != width:
        raise UserError(f"{path}: images must be square, got {height}x{width}")
    if cond and dataset.label_dim == 0:
        raise UserError(
            f"{path} has no labels: neither a dataset.json nor several class folders; --uncond trains without"
        )
    return dataset


# ------------------------------------------------------------------------------------------------------------- stream


class IndexStream(torch.utils.data.Sampler[int]):
    """Endless item indices of one process: images start + rank, start + rank + world_size, ... of the run, each epoch
    a full permutation (spec 4.7). Depends on nothing but its arguments."""

    def __init__(self, num_items: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.num_items = num_items
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[int]:
        epoch, order = -1, np.empty([0])
        for image in itertools.count(self.start + self.rank, self.world_size):
            if image // self.num_items != epoch:
                epoch = image // self.num_items
                order = epoch_order(self.seed, epoch, self.num_items)
            yield int(order[image % self.num_items])


def batches(
    dataset: Dataset, batch: int, indices: IndexStream, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (stored images [batch, C, H, W], labels [batch, label_dim]) on ``device``.

    A preloaded data set is kept on the device; any other is read ahead by two processes.
    """
    if dataset.in_memory is not None:
        images, labels = (value.to(device) for value in dataset.in_memory)
        stream = iter(indices)
        while True:
            chosen = torch.tensor(list(itertools.islice(stream, batch)), device=device)
            yield images[chosen], labels[chosen]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=batch,
        sampler=indices,
        num_workers=2,
        prefetch_factor=2,
        pin_memory=device.type == "cuda",
    )
    try:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    except UserError as error:  # a loader process wraps the message in its traceback
        raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from None
