"""Magnitude-preserving layers for anyone's model. Parameter and buffer names are those of released EDM2 networks."""

import math
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from edm2ext import ops

Mode = Literal["forward", "step", "off"]
_MODES = ("forward", "step", "off")
_mode: Mode = "forward"


class force_normalization:
    """Say who applies forced weight normalisation (2.6 step 2, Eq. 66), for the whole process.

    "forward" (the default): every layer overwrites its weight by its normalised value when called in training mode with
    gradients enabled. "step": the optimizer does it after its step. "off": nobody does. Takes effect at once; used in a
    `with` statement, the previous mode returns at the end of the block.

    Raises ValueError for any other mode.
    """

    def __init__(self, mode: Mode) -> None:
        global _mode
        if mode not in _MODES:
            raise ValueError(f"force_normalization: mode must be one of {', '.join(_MODES)}, got {mode!r}")
        self._previous = _mode
        _mode = mode

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _mode
        _mode = self._previous


def forces_in_forward(training: bool) -> bool:
    """Whether a layer in the given mode overwrites its weight when called now."""
    return training and _mode == "forward" and torch.is_grad_enabled()


class MPConv(nn.Module):
    """Magnitude-preserving 2-D convolution without bias, zero-padded to keep the size (2.6, Eqs. 47 and 66).

    The weight [out_channels, in_channels / groups, kernel_size, kernel_size] starts as N(0, 1).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        if in_channels % groups != 0 or out_channels % groups != 0:
            raise ValueError(
                f"MPConv: groups must divide in_channels={in_channels} and out_channels={out_channels}, got {groups}"
            )
        self.stride = stride
        self.dilation = dilation
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // groups, kernel_size, kernel_size))

    def forward(self, x: Tensor, gain: "Tensor | float" = 1) -> Tensor:
        """x [N, in_channels, H, W] -> [N, out_channels, H / stride, W / stride]; gain multiplies the weight."""
        if forces_in_forward(self.training):
            ops.force_normalize_(self.weight)
        return ops.mp_conv2d(
            x,
            self.weight,
            gain,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}, stride={self.stride}, dilation={self.dilation}, groups={self.groups}"


class MPLinear(nn.Module):
    """Magnitude-preserving linear layer without bias (2.6, Eqs. 47 and 66).

    The weight [out_features, in_features] starts as N(0, 1).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x: Tensor, gain: "Tensor | float" = 1) -> Tensor:
        """x [..., in_features] -> [..., out_features]; gain multiplies the weight."""
        if forces_in_forward(self.training):
            ops.force_normalize_(self.weight)
        return ops.mp_linear(x, self.weight, gain)

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}"


class MPFourier(nn.Module):
    """Random Fourier features of unit magnitude (2.5, Eq. 75).

    The buffers are fixed: frequencies 2 pi * bandwidth * N(0, 1), phases uniform in [0, 2 pi).
    """

    def __init__(self, num_channels: int, bandwidth: float = 1) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels) * bandwidth)
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [N] -> [N, num_channels]."""
        return ops.mp_fourier(x, self.freqs, self.phases)

    def extra_repr(self) -> str:
        return f"num_channels={len(self.freqs)}"
