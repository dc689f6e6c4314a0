"""Magnitudes of activations and weights by resolution: the plots of the EDM2 paper (spec 10.2; Figs. 3 and 15)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edm2ext.nn import MPConv, MPLinear
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
    clipped: list[float]  # of each block: the fraction of its output's values that the clip at ±256 cut off


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
    clipped: dict[str, float] = {}
    handles = []
    blocks = list(_by_bucket(net))

    def record(layer: MPConv, args: tuple[Tensor, ...], options: dict[str, Any], y: Tensor, name: str) -> None:
        if options.pop("then", None) is not None:  # fused with what follows
            y = layer.forward(*args, **options)
        if options.get("first") is not None:  # of a concatenation, whose mp_silu comes with it
            y, _ = y
        squares[name] = y.float().square().mean(dim=(0, 2, 3))

    def count(block: Block, _: object, y: Tensor, name: str) -> None:
        clipped[name] = 0.0 if block.clip_act is None else float((y.abs() >= block.clip_act).float().mean())

    for _, block_name, block in blocks:
        handles.append(block.register_forward_hook(partial(count, name=block_name)))
        for name, layer in block.named_modules():
            if isinstance(layer, MPConv):
                hook = partial(record, name=f"{block_name}.{name}")
                handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        net(x, sigma, class_labels)
    finally:
        for handle in handles:
            handle.remove()
    c_noise = sigma.to(x.device, torch.float32).flatten().log() / 4
    emb = net.unet.embedding(c_noise, class_labels if net.label_dim else None)
    found: dict[str, Bucket] = {}
    for bucket_name, block_name, block in blocks:
        bucket = found.setdefault(bucket_name, Bucket(bucket_name, [], [], []))
        bucket.clipped.append(clipped[block_name])
        name = f"{block_name}.emb_linear"
        squares[name] = block.emb_linear(emb, gain=block.emb_gain).square().mean(dim=0)
        for layer_name, layer in block.named_modules():
            if isinstance(layer, MPConv | MPLinear):
                name = f"{block_name}.{layer_name}"
                bucket.activations.append(_summary(name, squares[name]))
                bucket.weights.append(_summary(name, layer.weight.flatten(1).square().mean(dim=1)))
    return list(found.values())


def as_stats(buckets: list[Bucket]) -> dict[str, float]:
    """The largest and the mean magnitude of each bucket, as entries of statistics: "Magnitude/Enc 16/activations_max",
    and the largest clipped fraction, "Magnitude/Enc 16/clipped".

    Means are over layers, of the layers' means.
    """
    stats = {}
    for bucket in buckets:
        for kind in ("activations", "weights"):
            magnitudes = getattr(bucket, kind)
            stats[f"Magnitude/{bucket.name}/{kind}_max"] = max(m.max for m in magnitudes)
            stats[f"Magnitude/{bucket.name}/{kind}_mean"] = sum(m.mean for m in magnitudes) / len(magnitudes)
        stats[f"Magnitude/{bucket.name}/clipped"] = max(bucket.clipped)
    return stats


def mean_weight(buckets: list[Bucket]) -> float:
    """Mean magnitude of the weights: what a learning rate must be seen in relation to (the paper's configuration E)."""
    means = [m.mean for bucket in buckets for m in bucket.weights]
    return sum(means) / len(means)


def drifting(buckets: list[Bucket], weights_to: float = 1.5, activations_to: float = 50.0) -> dict[str, str]:
    """A sentence for each layer whose magnitudes are far from what the architecture keeps them at: rows of weights at 1
    and activations in the order of 1 (the paper's configurations E to G stay below 15; Fig. 3)."""
    weights = [m for bucket in buckets for m in bucket.weights if not m.max <= weights_to]
    activations = [m for bucket in buckets for m in bucket.activations if not m.max <= activations_to]
    return {
        **{m.layer: f"activations of {m.layer} reach magnitude {m.max:.3g} (about 1 expected)" for m in activations},
        **{m.layer: f"weights of {m.layer} have rows of magnitude {m.max:.3g} (kept at 1)" for m in weights},
    }
