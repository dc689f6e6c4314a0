"""Data sets (spec 8.2): embedded digits, image folders and ZIPs."""

from __future__ import annotations

import abc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm
from torch import Tensor

from python_train import UserError
from python_train.data.container import INDEX, Problem, Source, Statistics, classes_within, find_labels, read_index
from python_train.data.encoders import VAE_MEAN, Encoder, LatentEncoder, PixelEncoder, StandardizedEncoder
from python_train.data.images import decode_array, is_item

DIGITS = "digits"
IN_MEMORY_BYTES = 2**30


class Dataset(abc.ABC):
    """Images of one shape with optional labels. Sub-classes say how item i is read.

    Attributes: ``name``, ``num_images``, ``channels`` (as stored), ``shape`` [C, H, W], ``resolution`` (the longer
    side, by which the network's levels are named), ``label_dim`` (0 = no labels), ``label_kind`` ("none", "index",
    "multi-hot" or "vector") and ``class_names`` (of vectors only where they are multi-hot and
    named).
    ``dataset[i]`` is ``(stored array [C, H, W], float32 [label_dim])``.
    With ``xflip`` there are twice as many images, the second half being the first, mirrored.
    ``cache_bytes`` is how large a data set :meth:`preload` keeps in memory, ``workers`` how many processes read ahead
    of any other one.
    """

    def __init__(
        self,
        name: str,
        path: str,
        labels: np.ndarray | None,
        class_names: list[str] | None = None,
        xflip: bool = False,
    ) -> None:
        self.name = name
        self.path = path
        self.labels = labels
        self.xflip = xflip
        self.label_kind = _label_kind(labels)
        named = list(class_names or [])
        if labels is None:
            self.label_dim = 0
        elif labels.ndim == 2:
            self.label_dim = labels.shape[1]
        else:
            self.label_dim = max(int(labels.max()) + 1, len(named))
        if self.label_kind == "index":
            named = named or [str(i) for i in range(self.label_dim)]
        self.class_names = named if self.label_kind in ("index", "multi-hot") else []
        self.num_stored = self._count()
        self.num_images = self.num_stored * (1 + xflip)
        first = self.read(0)
        self.dtype = first.dtype
        self.shape = first.shape
        self.channels, self.resolution = self.shape[0], max(self.shape[1:])
        self.cache_bytes = IN_MEMORY_BYTES
        self.workers = 2
        self.in_memory: tuple[Tensor, Tensor] | None = None

    @abc.abstractmethod
    def _count(self) -> int:
        """Number of stored images."""

    @abc.abstractmethod
    def _read(self, index: int) -> np.ndarray:
        """One stored image as a writable array [C, H, W]."""

    def read(self, index: int) -> np.ndarray:
        """The array [C, H, W] of one image, mirrored if it is of the second half of an x-flipped data set."""
        image = self._read(index % self.num_stored)
        return image if index < self.num_stored else np.ascontiguousarray(image[..., ::-1])

    def label(self, index: int) -> np.ndarray:
        """Label of one image as float32 [label_dim]: one-hot for class labels, the vector itself otherwise."""
        if self.labels is None:
            return np.zeros([0], dtype=np.float32)
        index %= self.num_stored
        if self.labels.ndim == 2:
            return self.labels[index]
        one_hot = np.zeros([self.label_dim], dtype=np.float32)
        one_hot[self.labels[index]] = 1
        return one_hot

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.read(index), self.label(index)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Many items at once: images [N, C, H, W] in the stored dtype and labels [N, label_dim] float32."""
        images = np.empty([len(indices), *self.shape], self.dtype)
        labels = np.empty([len(indices), self.label_dim], np.float32)
        for row, index in enumerate(indices):
            images[row], labels[row] = self.read(index), self.label(index)
        return torch.from_numpy(images), torch.from_numpy(labels)

    def preload(self, progress: bool = False) -> None:
        """Read everything now, and keep it, if it fits in ``cache_bytes``: a damaged image shows before anything
        starts."""
        if self.num_stored * np.prod(self.shape) * self.dtype.itemsize <= self.cache_bytes:
            self.in_memory = self.load_all(progress)

    def load_all(self, progress: bool = False) -> tuple[Tensor, Tensor]:
        """Every stored image [N, C, H, W] in the stored dtype and every label [N, label_dim] float32."""
        bar = tqdm.tqdm(total=self.num_stored, desc="reading images", unit="img", disable=not progress, leave=False)
        images = np.empty([self.num_stored, *self.shape], self.dtype)
        with bar:
            for index in range(self.num_stored):
                images[index] = self.read(index)
                bar.update()
        labels = np.stack([self.label(index) for index in range(self.num_stored)])
        return torch.from_numpy(images), torch.from_numpy(labels)

    def require_divisible(self, stride: int) -> None:
        """Raise UserError unless the network's ``stride``, the product of its downsamplings, divides both sides."""
        height, width = self.shape[1:]
        if height % stride or width % stride:
            raise UserError(
                f"the network does not fit the data: {self.path} has images of {height}x{width}, but both sides must "
                f"be divisible by {stride}, as the network halves them {stride.bit_length() - 1} times"
            )

    def encoder(self) -> Encoder:
        """The encoder that takes this data set to the network's domain."""
        return LatentEncoder() if self.dtype == np.float32 else PixelEncoder()

    def facts(self) -> dict[str, Any]:
        """What a snapshot's header says of the data it was trained on."""
        facts = {
            "name": self.name,
            "path": self.path,
            "num_images": self.num_images,
            "resolution": self.resolution,
            "channels": self.channels,
            "label_dim": self.label_dim,
            "class_names": self.class_names,
        }
        if self.shape[1] != self.shape[2]:
            facts["size"] = list(self.shape[1:])
        if self.xflip:
            facts["xflip"] = True
        return facts


def _label_kind(labels: np.ndarray | None) -> str:
    if labels is None:
        return "none"
    if labels.ndim == 1:
        return "index"
    return "multi-hot" if np.isin(labels, (0, 1)).all() else "vector"


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits: uint8 [1, 8, 8], the values 0..16 spread over 0..255, ten classes."""

    def __init__(self, cond: bool = True, xflip: bool = False) -> None:
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        self.images = np.rint(values.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
        super().__init__(DIGITS, DIGITS, labels.astype(np.int64) if cond else None, xflip=xflip)

    def _count(self) -> int:
        return len(self.images)

    def _read(self, index: int) -> np.ndarray:
        return self.images[index]

    def encoder(self) -> Encoder:
        return StandardizedEncoder(round(float(self.images.mean()), 4), round(float(self.images.std()), 4))


class ImageArchive(Dataset):
    """A folder or ZIP of images, or of .npy arrays: uint8 pixels or VAE latents (spec 8.1, 8.2).

    Labels come from ``dataset.json`` if there is one, else from the top-level folders' names if there are several.
    Raises UserError, naming the file, for an empty archive, unreadable or unequal images, files that must not be read
    (:class:`python_train.data.container.Source`), and labels that are missing or inconsistent.
    """

    def __init__(self, path: str | os.PathLike[str], cond: bool = True, xflip: bool = False) -> None:
        self.source = Source(path, is_item)
        self.source.require_sound()
        self.names = [name for name in self.source.names if name != INDEX]
        if not self.names:
            raise UserError(f"no images (.png, .jpg, ... or .npy) in {self.source.path}")
        self._alike: tuple[tuple[int, ...], np.dtype] | None = None
        index = read_index(self.source) if cond or self.names[0].endswith(".npy") else None
        self.statistics: Statistics | None = index.statistics if index else None
        labels = class_names = None
        if cond:
            labels, class_names, problems = find_labels(self.names, index)
            _require_labelled(self.source.path, problems, len(self.names))
        super().__init__(self.source.path.stem, str(self.source.path), labels, class_names, xflip)

    def _count(self) -> int:
        return len(self.names)

    def _read(self, index: int) -> np.ndarray:
        name = self.names[index]
        image = decode_array(f"{self.source.path}: {name}", name, self.source.read(name))
        if self._alike is None:
            self._alike = image.shape, image.dtype
        if (image.shape, image.dtype) != self._alike:
            raise UserError(
                f"{self.source.path}: {name} is {describe_shape(image.shape, image.dtype)} but {self.names[0]} is "
                f"{describe_shape(*self._alike)}; all images must be alike"
            )
        return image

    def encoder(self) -> Encoder:
        """Pixels: the plain one. Latents: whitened by the statistics that ``dataset.json`` holds, or, with the four
        channels of the official data, by ImageNet's (spec 1.2). Raises UserError if there are neither."""
        if self.dtype != np.float32:
            return PixelEncoder()
        latent_channels = self.channels // 2
        if self.statistics is not None and len(self.statistics.mean) == latent_channels:
            return LatentEncoder(self.statistics.mean, self.statistics.std)
        if self.statistics is None and latent_channels == len(VAE_MEAN):
            return LatentEncoder()
        raise UserError(
            f"{self.path} holds latents of {latent_channels} channels without statistics to whiten them by; "
            f"store them: python -m python_train.data stats {self.path}"
        )


def _require_labelled(path: Path, problems: list[Problem], total: int) -> None:
    """Raise UserError for the first item without a usable label."""
    if not problems:
        return
    missing = [problem for problem in problems if problem.reason == "has no label"]
    if missing:
        raise UserError(f"{path}: {INDEX} has no label for {len(missing)} of {total} images, e.g. {missing[0].name}")
    name, reason = problems[0]
    others = f" (and {len(problems) - 1} other problems)" if len(problems) > 1 else ""
    raise UserError(f"{path}: {name} {reason}{others}")


def describe_shape(shape: tuple[int, ...], dtype: np.dtype) -> str:
    """A shape [C, H, W] in words."""
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' * (shape[0] > 1)} {dtype}"


def open_dataset(
    name_or_path: str | os.PathLike[str] = DIGITS,
    cond: bool = True,
    xflip: bool = False,
    cache_bytes: int = IN_MEMORY_BYTES,
    workers: int = 2,
) -> Dataset:
    """The embedded ``"digits"`` or an image folder / ZIP; the options are those of :class:`Dataset`. ``cond=False``
    ignores labels.

    Raises UserError if it is missing, empty or damaged, or if labels were asked for but there are none.
    """
    dataset: Dataset = Digits(cond, xflip) if str(name_or_path) == DIGITS else _open_archive(name_or_path, cond, xflip)
    dataset.cache_bytes, dataset.workers = cache_bytes, workers
    return dataset


def _open_archive(path: str | os.PathLike[str], cond: bool, xflip: bool) -> ImageArchive:
    if not Path(path).exists():
        raise UserError(f"no such data set: {path} (give a folder, a ZIP file, or '{DIGITS}')")
    dataset = ImageArchive(path, cond, xflip)
    if cond and dataset.label_dim == 0:
        top = classes_within(dataset.names)
        raise UserError(
            f"{path} has no labels: neither a dataset.json nor several class folders"
            + (f" (those in {top}/ are a level too deep)" if top else "")
            + "; --uncond trains without"
        )
    return dataset
