"""The network of the Fréchet inception distance: Inception-v3 as trained by Google on 2015-12-05 (spec 7).

Modules have the names of the TensorFlow graph, as the file distributed with StyleGAN has them. The file of pytorch-fid
and torch-fidelity holds the same weights under other names. torchvision's Inception is another network: its FIDs are
not comparable.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from python_train import UserError
from python_train.metrics.preprocess import resize_tensorflow

RESOLUTION = 299
DIM = 2048
Kernel = tuple[int, int]


class ConvBN(nn.Module):
    """Convolution, batch normalisation without a scale, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int | Kernel, stride: int = 1, same: bool = True
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.stride = stride
        self.padding = (height // 2, width // 2) if same else 0
        self.register_buffer("weight", torch.zeros(out_channels, in_channels, height, width))
        for name in ("beta", "mean", "var"):
            self.register_buffer(name, torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        return F.relu(F.batch_norm(x, self.mean, self.var, bias=self.beta, eps=1e-3))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed35(nn.Module):
    """mixed to mixed_2, at 35×35."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.conv = ConvBN(channels, 64, 1)
        self.tower_conv, self.tower_conv_1 = ConvBN(channels, 48, 1), ConvBN(48, 64, 5)
        self.tower_1_conv, self.tower_1_conv_1 = ConvBN(channels, 64, 1), ConvBN(64, 96, 3)
        self.tower_1_conv_2 = ConvBN(96, 96, 3)
        self.tower_2_conv = ConvBN(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        tower = self.tower_conv_1(self.tower_conv(x))
        tower_1 = self.tower_1_conv_2(self.tower_1_conv_1(self.tower_1_conv(x)))
        return torch.cat([self.conv(x), tower, tower_1, self.tower_2_conv(_average(x))], dim=1)


class Reduce35(nn.Module):
    """mixed_3, from 35×35 to 17×17."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvBN(288, 384, 3, stride=2, same=False)
        self.tower_conv, self.tower_conv_1 = ConvBN(288, 64, 1), ConvBN(64, 96, 3)
        self.tower_conv_2 = ConvBN(96, 96, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        tower = self.tower_conv_2(self.tower_conv_1(self.tower_conv(x)))
        return torch.cat([self.conv(x), tower, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed17(nn.Module):
    """mixed_4 to mixed_7, at 17×17."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.conv = ConvBN(768, 192, 1)
        self.tower_conv, self.tower_conv_1 = ConvBN(768, hidden, 1), ConvBN(hidden, hidden, (1, 7))
        self.tower_conv_2 = ConvBN(hidden, 192, (7, 1))
        self.tower_1_conv, self.tower_1_conv_1 = ConvBN(768, hidden, 1), ConvBN(hidden, hidden, (7, 1))
        self.tower_1_conv_2, self.tower_1_conv_3 = ConvBN(hidden, hidden, (1, 7)), ConvBN(hidden, hidden, (7, 1))
        self.tower_1_conv_4 = ConvBN(hidden, 192, (1, 7))
        self.tower_2_conv = ConvBN(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        tower = self.tower_conv_2(self.tower_conv_1(self.tower_conv(x)))
        tower_1 = self.tower_1_conv_2(self.tower_1_conv_1(self.tower_1_conv(x)))
        tower_1 = self.tower_1_conv_4(self.tower_1_conv_3(tower_1))
        return torch.cat([self.conv(x), tower, tower_1, self.tower_2_conv(_average(x))], dim=1)


class Reduce17(nn.Module):
    """mixed_8, from 17×17 to 8×8."""

    def __init__(self) -> None:
        super().__init__()
        self.tower_conv, self.tower_conv_1 = ConvBN(768, 192, 1), ConvBN(192, 320, 3, stride=2, same=False)
        self.tower_1_conv, self.tower_1_conv_1 = ConvBN(768, 192, 1), ConvBN(192, 192, (1, 7))
        self.tower_1_conv_2 = ConvBN(192, 192, (7, 1))
        self.tower_1_conv_3 = ConvBN(192, 192, 3, stride=2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        tower = self.tower_conv_1(self.tower_conv(x))
        tower_1 = self.tower_1_conv_2(self.tower_1_conv_1(self.tower_1_conv(x)))
        return torch.cat([tower, self.tower_1_conv_3(tower_1), F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed8(nn.Module):
    """mixed_9 and mixed_10, at 8×8; the second pools by the maximum."""

    def __init__(self, channels: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.conv = ConvBN(channels, 320, 1)
        self.tower_conv = ConvBN(channels, 384, 1)
        self.tower_mixed_conv, self.tower_mixed_conv_1 = ConvBN(384, 384, (1, 3)), ConvBN(384, 384, (3, 1))
        self.tower_1_conv, self.tower_1_conv_1 = ConvBN(channels, 448, 1), ConvBN(448, 384, 3)
        self.tower_1_mixed_conv, self.tower_1_mixed_conv_1 = ConvBN(384, 384, (1, 3)), ConvBN(384, 384, (3, 1))
        self.tower_2_conv = ConvBN(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        tower, tower_1 = self.tower_conv(x), self.tower_1_conv_1(self.tower_1_conv(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        parts = [
            self.conv(x),
            *(self.tower_mixed_conv(tower), self.tower_mixed_conv_1(tower)),
            *(self.tower_1_mixed_conv(tower_1), self.tower_1_mixed_conv_1(tower_1)),
            self.tower_2_conv(pooled),
        ]
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """RGB [N,3,299,299], scaled to about [−1, 1], to the pooled features [N,2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_1 = ConvBN(3, 32, 3, stride=2, same=False), ConvBN(32, 32, 3, same=False)
        self.conv_2, self.conv_3, self.conv_4 = ConvBN(32, 64, 3), ConvBN(64, 80, 1), ConvBN(80, 192, 3, same=False)
        self.mixed, self.mixed_1, self.mixed_2 = Mixed35(192, 32), Mixed35(256, 64), Mixed35(288, 64)
        self.mixed_3 = Reduce35()
        self.mixed_4, self.mixed_5, self.mixed_6, self.mixed_7 = (Mixed17(hidden) for hidden in (128, 160, 160, 192))
        self.mixed_8 = Reduce17()
        self.mixed_9, self.mixed_10 = Mixed8(1280, maximum=False), Mixed8(2048, maximum=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_2(self.conv_1(self.conv(x)))
        x = self.conv_4(self.conv_3(F.max_pool2d(x, 3, stride=2)))
        x = self.mixed_3(self.mixed_2(self.mixed_1(self.mixed(F.max_pool2d(x, 3, stride=2)))))
        x = self.mixed_7(self.mixed_6(self.mixed_5(self.mixed_4(x))))
        return self.mixed_10(self.mixed_9(self.mixed_8(x))).mean((2, 3))

    def features(self, rgb: Tensor) -> Tensor:
        """RGB of any size with values 0..255 to features [N,2048]."""
        return self((resize_tensorflow(rgb, RESOLUTION) - 128) / 128)


# ------------------------------------------------------------------------------------------ names in pytorch-fid's file

_STEM = {"1a_3x3": "conv", "2a_3x3": "conv_1", "2b_3x3": "conv_2", "3b_1x1": "conv_3", "4a_3x3": "conv_4"}
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


def _tower(branch: str, tower: str, length: int) -> dict[str, str]:
    """branch_1, branch_2, ... are tower_conv, tower_conv_1, ..."""
    return {f"{branch}_{index + 1}": f"{tower}_conv" + f"_{index}" * (index > 0) for index in range(length)}


_MIXED_35 = {
    "branch1x1": "conv",
    **_tower("branch5x5", "tower", 2),
    **_tower("branch3x3dbl", "tower_1", 3),
    "branch_pool": "tower_2_conv",
}
_REDUCE_35 = {"branch3x3": "conv", **_tower("branch3x3dbl", "tower", 3)}
_MIXED_17 = {
    "branch1x1": "conv",
    **_tower("branch7x7", "tower", 3),
    **_tower("branch7x7dbl", "tower_1", 5),
    "branch_pool": "tower_2_conv",
}
_REDUCE_17 = {**_tower("branch3x3", "tower", 2), **_tower("branch7x7x3", "tower_1", 4)}
_MIXED_8 = {
    "branch1x1": "conv",
    "branch3x3_1": "tower_conv",
    "branch3x3_2a": "tower_mixed_conv",
    "branch3x3_2b": "tower_mixed_conv_1",
    **_tower("branch3x3dbl", "tower_1", 2),
    "branch3x3dbl_3a": "tower_1_mixed_conv",
    "branch3x3dbl_3b": "tower_1_mixed_conv_1",
    "branch_pool": "tower_2_conv",
}
_BRANCHES = {"5": _MIXED_35, "6a": _REDUCE_35, "6": _MIXED_17, "7a": _REDUCE_17, "7": _MIXED_8}
_LEAVES = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}


def _graph_name(name: str) -> str | None:
    """Our name of a tensor in pytorch-fid's file; None for one that is not used."""
    if match := re.fullmatch(r"Conv2d_(\w+?)\.((?:conv|bn)\.\w+)", name):
        module, leaf = _STEM.get(match[1]), _LEAVES.get(match[2])
    elif (match := re.fullmatch(r"Mixed_(\d\w)\.(\w+)\.((?:conv|bn)\.\w+)", name)) and match[1] in _BLOCKS:
        number = _BLOCKS.index(match[1])
        branches = _BRANCHES.get(match[1]) or _BRANCHES[match[1][0]]
        branch, leaf = branches.get(match[2]), _LEAVES.get(match[3])
        module = branch and "mixed" + f"_{number}" * (number > 0) + f".{branch}"
    else:
        return None
    return f"{module}.{leaf}" if module and leaf else None


def from_state_dict(tensors: Mapping[str, Tensor], where: str) -> Inception:
    """The network with the weights of either file, by their names there.

    Raises UserError, starting with ``where``, unless there is each of the network's tensors in the right shape. A scale
    of the batch normalisations, which this network does not have, must be 1.
    """
    scales = [name for name in tensors if name.endswith("bn.weight") and not name.startswith("AuxLogits")]
    if any(not torch.equal(tensors[name], torch.ones_like(tensors[name])) for name in scales):
        raise UserError(f"{where} is another Inception: its batch normalisations have scales (torchvision's has)")
    found = {name.removeprefix("layers."): value for name, value in tensors.items()}
    found.update({ours: value for name, value in tensors.items() if (ours := _graph_name(name))})
    net = Inception()
    for name, buffer in net.named_buffers():
        if name not in found or found[name].shape != buffer.shape:
            raise UserError(f"{where} is not the Inception network of FID: its tensor {name} is missing or misshapen")
        buffer.copy_(found[name])
    return net
