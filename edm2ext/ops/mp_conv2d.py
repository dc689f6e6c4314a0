"""Magnitude-preserving convolution and linear layer (specification 2.6, Eq. 47)."""

import torch.nn.functional as F
from torch import Tensor

from edm2ext import checks
from edm2ext.ops.normalize_weight import unchecked_effective_weight
from edm2ext.reference import product_dtype


def mp_conv2d(
    x: Tensor,
    w: Tensor,
    gain: "Tensor | float" = 1,
    *,
    prepared: bool = False,
    stride: "int | tuple[int, int]" = 1,
    padding: "str | int | tuple[int, int]" = "same",
    dilation: "int | tuple[int, int]" = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution of x [N, C, H, W] with the effective weight of w [out, C / groups, kh, kw] (2.6, Eq. 47).

    gain is a number or a 0-dim tensor. The weight follows x's dtype, or autocast's. Padding "same" puts
    dilation * (k - 1) / 2 zeros on each side, so that stride 1 keeps the size, and needs odd kernel sizes. With
    `prepared`, w is an effective weight already, and gain must be 1. Raises ValueError or TypeError for shapes that do
    not match, or other values of gain, padding and groups.
    """
    pad = checks.conv_arguments(x, w, gain, prepared, padding, dilation, groups)
    dtype = product_dtype(x)
    kernel = w.to(dtype) if prepared else unchecked_effective_weight(w, gain, dtype)
    return F.conv2d(x, kernel, stride=stride, padding=pad, dilation=dilation, groups=groups)


def mp_linear(x: Tensor, w: Tensor, gain: "Tensor | float" = 1, *, prepared: bool = False) -> Tensor:
    """x [..., in] times the effective weight of the raw weight w [out, in], without bias (2.6, Eq. 47).

    gain is a number or a 0-dim tensor. The weight follows x's dtype, or autocast's. With `prepared`, w is an effective
    weight already, and gain must be 1. Raises ValueError or TypeError for shapes that do not match or another gain.
    """
    checks.linear_arguments(x, w, gain, prepared)
    dtype = product_dtype(x)
    return F.linear(x, w.to(dtype) if prepared else unchecked_effective_weight(w, gain, dtype))
