"""Reference files: what the metrics compare images with, of our own and of the published kinds (spec 7)."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from python_train import UserError
from python_train.checkpoint import atomic_write
from python_train.metrics.compare import ReferenceFeatures
from python_train.metrics.extractors import KINDS, FeatureExtractor
from python_train.metrics.moments import Gaussian
from python_train.pickles.metrics import read_metric_reference

FORMAT_VERSION = 1
_HEADER = "edm2_reference"
_PUBLISHED = {"fid": "inception", "fd_dinov2": "dinov2"}


@dataclass(frozen=True)
class Reference:
    """The reference features of a data set, by kind. ``identities`` tell the networks, ``shape`` is that of the images
    [C,H,W]; both are unknown for published files."""

    features: dict[str, ReferenceFeatures]
    identities: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    name: str = ""

    def require(self, path: Path, name: str) -> None:
        """Raise UserError unless this has features of a kind."""
        if name not in self.features:
            raise UserError(f"{path} has no features {name}; it has {', '.join(self.features)}")

    def check(self, path: Path, extractor: FeatureExtractor) -> None:
        """Raise UserError if an extractor is not the network that the features are of."""
        identity = self.identities.get(extractor.name)
        if identity is not None and identity != extractor.identity:
            raise UserError(f"the features {extractor.name} in {path} were made by a network with other weights")

    def check_shape(self, path: Path, shape: tuple[int, ...]) -> None:
        """Raise UserError unless images of this shape [C,H,W] can be compared with the reference's."""
        if self.shape is not None and tuple(shape[1:]) != tuple(self.shape[1:]):
            ours, theirs = (f"{size[1]}x{size[2]}" for size in (shape, self.shape))
            raise UserError(f"the images are {ours}, those of {path} {theirs}: compare images of one size")


def write_reference(path: Path, reference: Reference) -> None:
    """Write our kind of file, atomically: safetensors with a readable JSON header. OSError if the disk refuses."""
    tensors: dict[str, Tensor] = {}
    for name, features in reference.features.items():
        tensors[f"{name}.mu"], tensors[f"{name}.sigma"] = features.gaussian.mu, features.gaussian.sigma
        if features.features is not None:
            tensors[f"{name}.features"] = features.features
    header = {
        "format_version": FORMAT_VERSION,
        "name": reference.name,
        "num_images": {name: features.gaussian.num for name, features in reference.features.items()},
        "identities": reference.identities,
        "shape": reference.shape,
    }
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            safetensors.torch.save_file(contiguous, temporary, metadata={_HEADER: json.dumps(header)})
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error


def read_reference(path: Path) -> Reference:
    """Read a reference file: ours, a ``.pkl`` of the EDM2 reference program (read as data), or an ``.npz`` of EDM with
    ``mu`` and ``sigma`` of FID.

    Raises UserError, naming the file, if it is missing, damaged, something else, or of a newer version.
    """
    if not path.is_file():
        raise UserError(f"no such reference file: {path}; make one: python -m python_train.metrics ref DATA {path}")
    if path.suffix == ".pkl":
        return _read_pickle(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    return _read_own(path)


def _read_own(path: Path) -> Reference:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if header["format_version"] > FORMAT_VERSION:
            raise UserError(f"{path} has version {header['format_version']}; this program reads {FORMAT_VERSION}")
        features = {
            name: ReferenceFeatures(
                _gaussian(path, num, tensors[f"{name}.mu"], tensors[f"{name}.sigma"]),
                _checked_features(path, name, tensors),
            )
            for name, num in header["num_images"].items()
        }
        return Reference(features, header["identities"], tuple(header["shape"]), header["name"])
    except UserError:
        raise
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or not a reference file (.safetensors, .pkl or .npz): {error}") from error


def _checked_features(path: Path, name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    features = tensors.get(f"{name}.features")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(tensors[f"{name}.mu"])):
        raise UserError(f"{path}: the features {name} have the shape {list(features.shape)}")
    if features is not None and not bool(features.isfinite().all()):
        raise UserError(f"{path}: the features {name} are not finite")
    return features


def _gaussian(path: Path, num: Any, mu: Any, sigma: Any) -> Gaussian:
    """Checked mean and covariance."""
    mu, sigma = (torch.as_tensor(np.asarray(value), dtype=torch.float64) for value in (mu, sigma))
    if type(num) is not int or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: expected mu [D] and sigma [D,D], got {list(mu.shape)} and {list(sigma.shape)}")
    if not bool(mu.isfinite().all()) or not bool(sigma.isfinite().all()):
        raise UserError(f"{path}: mu or sigma is not finite")
    if not torch.allclose(sigma, sigma.T, rtol=1e-6, atol=1e-6 * float(sigma.abs().max())):
        raise UserError(f"{path}: sigma is not symmetric, so it is no covariance")
    return Gaussian(num, mu, (sigma + sigma.T) / 2)


def _read_pickle(path: Path) -> Reference:
    content = read_metric_reference(path)
    num = content.get("num_images", 0)
    features = {
        ours: ReferenceFeatures(_published(path, num, content[theirs]))
        for theirs, ours in _PUBLISHED.items()
        if theirs in content
    }
    if not features:
        raise UserError(f"{path} is no reference of the EDM2 program: it has neither of {', '.join(_PUBLISHED)}")
    return Reference(features, name=path.stem)


def _published(path: Path, num: Any, statistics: Any) -> Gaussian:
    if not isinstance(statistics, dict) or not {"mu", "sigma"} <= statistics.keys():
        raise UserError(f"{path} is no reference of the EDM2 program: it lacks mu or sigma")
    return _gaussian(path, num, statistics["mu"], statistics["sigma"])


def _read_npz(path: Path) -> Reference:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            mu, sigma = arrays["mu"], arrays["sigma"]
        return Reference({"inception": ReferenceFeatures(_gaussian(path, 0, mu, sigma))}, name=path.stem)
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged, or not a reference file with mu and sigma: {error}") from error


def describe(reference: Reference) -> list[str]:
    """What it holds, a line for each kind."""
    lines = []
    for name, features in reference.features.items():
        kept = "statistics only" if features.features is None else f"{len(features.features)} kept for KID and the rest"
        number = features.gaussian.num or "an unknown number of"
        lines.append(f"{KINDS[name].frechet}: {number} images, {len(features.gaussian.mu)} features, {kept}")
    return lines
