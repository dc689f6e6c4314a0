"""Stand-ins for the files of the feature networks: the published shapes and names, weights drawn by chance."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from python_train.metrics import inception

_LEAVES = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}


def inception_tensors() -> dict[str, Tensor]:
    """Weights of FID's network under the names of the TensorFlow graph, float32; the same ones everywhere."""
    random = np.random.RandomState(0)
    tensors = {}
    for name, buffer in inception.Inception().named_buffers():
        values = random.standard_normal(buffer.shape).astype(np.float32)
        if name.endswith("weight"):
            values *= np.float32(2.2 / np.sqrt(buffer[0].numel()))
        else:
            values = 1 + values**2 if name.endswith("var") else values * np.float32(0.1)
        tensors[name] = torch.from_numpy(values)
    return tensors


def pytorch_fid_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of pytorch-fid and torch-fidelity, with what else their file has."""
    modules = {f"Conv2d_{theirs}": ours for theirs, ours in inception._STEM.items()}
    for number, block in enumerate(inception._BLOCKS):
        branches = inception._BRANCHES.get(block) or inception._BRANCHES[block[0]]
        ours = "mixed" + f"_{number}" * (number > 0)
        modules |= {f"Mixed_{block}.{branch}": f"{ours}.{name}" for branch, name in branches.items()}
    result = {}
    for theirs, ours in modules.items():
        for leaf, name in _LEAVES.items():
            result[f"{theirs}.{name}"] = tensors[f"{ours}.{leaf}"]
        result[f"{theirs}.bn.weight"] = torch.ones_like(tensors[f"{ours}.beta"])
        result[f"{theirs}.bn.num_batches_tracked"] = torch.tensor(0)
    return result | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def sample_images(count: int = 2, height: int = 40, width: int = 48) -> Tensor:
    """RGB images uint8 [N,3,H,W]: smooth, with some noise."""
    random = np.random.RandomState(5)
    coarse = torch.from_numpy(random.rand(count, 3, 5, 6).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.from_numpy(random.rand(count, 3, height, width).astype(np.float32))
    return ((0.9 * smooth + 0.1 * noise) * 255).to(torch.uint8)
