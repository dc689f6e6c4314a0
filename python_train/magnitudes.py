"""Magnitudes of activations and weights by resolution: the plots of the EDM2 paper (spec 10.2; Figs. 3 and 15)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edm2ext.nn import MPConv, MPLinear
from python_train import data
from python_train.network import Block, Precond

_BLOCK_NAME = re.compile(r"unet\.(enc|dec)\.(\d+)x\d+_\w+")


@dataclass(frozen=True)
class Magnitude:
    """Root mean square of the features (outputs) of one layer: mean and largest."""

    layer: str
    mean: float
    max: float


@dataclass(frozen=True)
class Bucket:
    """The layers of the blocks of one resolution in the encoder or the decoder, e.g. "Enc 16"."""

    name: str
    activations: list[Magnitude]
    weights: list[Magnitude]


def _by_bucket(net: Precond) -> Iterator[tuple[str, str, Block]]:
    """(bucket, name of the block, block) in order of evaluation."""
    for name, module in net.named_modules():
        if isinstance(module, Block) and (match := _BLOCK_NAME.fullmatch(name)):
            yield f"{match[1].capitalize()} {match[2]}", name, module


def _summary(layer: str, squares: Tensor) -> Magnitude:
    """Of the mean square of each feature."""
    rms = squares.sqrt()
    return Magnitude(layer, float(rms.mean()), float(rms.max()))


@torch.no_grad()
def measure(net: Precond, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> list[Bucket]:
    """Magnitudes of the blocks' layers for noisy images x [N, C, H, W] at noise levels sigma [N] (spec 10.2).

    Activations are the direct outputs of the layers, embedding linears included, after their gain; each feature's
    magnitude is its root mean square over images and pixels. Weights' magnitudes are those of their rows (Eq. 3), as
    they are stored: 1 for unit-normal weights. The network is evaluated once; its mode is not changed.
    """
    squares: dict[str, Tensor] = {}
    handles = []
    blocks = list(_by_bucket(net))
    for _, block_name, block in blocks:
        for name, layer in block.named_modules():
            if isinstance(layer, MPConv):

                def record(_: object, __: object, y: Tensor, name: str = f"{block_name}.{name}") -> None:
                    squares[name] = y.float().square().mean(dim=(0, 2, 3))

                handles.append(layer.register_forward_hook(record))
    try:
        net(x, sigma, class_labels)
    finally:
        for handle in handles:
            handle.remove()
    c_noise = sigma.to(x.device, torch.float32).flatten().log() / 4
    emb = net.unet.embedding(c_noise, class_labels if net.label_dim else None)
    found: dict[str, Bucket] = {}
    for bucket_name, block_name, block in blocks:
        bucket = found.setdefault(bucket_name, Bucket(bucket_name, [], []))
        name = f"{block_name}.emb_linear"
        squares[name] = block.emb_linear(emb, gain=block.emb_gain).square().mean(dim=0)
        for layer_name, layer in block.named_modules():
            if isinstance(layer, MPConv | MPLinear):
                name = f"{block_name}.{layer_name}"
                bucket.activations.append(_summary(name, squares[name]))
                bucket.weights.append(_summary(name, layer.weight.flatten(1).square().mean(dim=1)))
    return list(found.values())


def as_stats(buckets: list[Bucket]) -> dict[str, float]:
    """The largest and the mean magnitude of each bucket, as entries of statistics: "Magnitude/Enc 16/activations_max".

    Means are over layers, of the layers' means.
    """
    stats = {}
    for bucket in buckets:
        for kind in ("activations", "weights"):
            magnitudes = getattr(bucket, kind)
            stats[f"Magnitude/{bucket.name}/{kind}_max"] = max(m.max for m in magnitudes)
            stats[f"Magnitude/{bucket.name}/{kind}_mean"] = sum(m.mean for m in magnitudes) / len(magnitudes)
    return stats


def drifting(buckets: list[Bucket], weights_to: float = 1.5, activations_to: float = 50.0) -> dict[str, str]:
    """A sentence for each layer whose magnitudes are far from what the architecture keeps them at: rows of weights at 1
    and activations in the order of 1 (the paper's configurations E to G stay below 15; Fig. 3)."""
    weights = [m for bucket in buckets for m in bucket.weights if not m.max <= weights_to]
    activations = [m for bucket in buckets for m in bucket.activations if not m.max <= activations_to]
    return {
        **{m.layer: f"activations of {m.layer} reach magnitude {m.max:.3g} (about 1 expected)" for m in activations},
        **{m.layer: f"weights of {m.layer} have rows of magnitude {m.max:.3g} (kept at 1)" for m in weights},
    }


class Probe:
    """The first images of a data set at fixed noise levels: what a network's magnitudes are measured on in training."""

    def __init__(self, dataset: data.Dataset, encoder: data.Encoder, device: torch.device, images: int = 32) -> None:
        self.indices = range(min(images, dataset.num_images))
        self.dataset = dataset
        self.encoder = encoder
        self.device = device

    def measure(self, net: Precond) -> list[Bucket]:
        """Magnitudes of the network as it is, unaveraged: for all images once, sigma log-normal around the loss's."""
        stored = torch.stack([torch.from_numpy(self.dataset.read(i)) for i in self.indices]).to(self.device)
        labels = torch.stack([torch.as_tensor(self.dataset.label(i)) for i in self.indices]).to(self.device)
        generator = torch.Generator().manual_seed(0)
        images = self.encoder.encode(stored)
        sigma = (torch.randn(len(images), generator=generator) * 1.4 - 0.6).exp().to(self.device)
        noise = torch.randn(images.shape, generator=generator).to(self.device)
        return measure(net, images + sigma.reshape(-1, 1, 1, 1) * noise, sigma, labels)
