"""What happens to images before a feature network sees them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from python_train import UserError


def to_rgb(images: Tensor) -> Tensor:
    """uint8 images [N,C,H,W], grey or RGB, to float32 RGB [N,3,H,W] with values 0..255. UserError for other images."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(
            f"features are of grey or RGB images, uint8 [N,1 or 3,H,W]; got {images.dtype} {list(images.shape)}"
        )
    return images.to(torch.float32).expand(-1, 3, -1, -1)


def resize_bicubic(rgb: Tensor, resolution: int) -> Tensor:
    """Bicubic with antialiasing, on floats and without quantising the result (spec 7)."""
    return F.interpolate(rgb, (resolution, resolution), mode="bicubic", antialias=True, align_corners=False)


def resize_tensorflow(rgb: Tensor, resolution: int) -> Tensor:
    """Bilinear as the first TensorFlow did it: output pixel i lies at i·(input size / output size), no antialiasing."""
    rows, columns = (_interpolation(size, resolution, rgb) for size in rgb.shape[-2:])
    return rows @ rgb @ columns.T


def _interpolation(size: int, resolution: int, like: Tensor) -> Tensor:
    """Matrix [resolution, size] that interpolates linearly along one axis."""
    position = torch.arange(resolution, dtype=torch.float32, device=like.device) * (size / resolution)
    lower = position.floor().long().clamp(max=size - 1)
    upper = (lower + 1).clamp(max=size - 1)
    weight = (position - lower)[:, None]
    identity = torch.eye(size, device=like.device)
    return identity[lower] * (1 - weight) + identity[upper] * weight
