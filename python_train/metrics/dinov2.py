"""The network of FD-DINOv2: the vision transformer DINOv2 ViT-L/14 without registers (spec 7)."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from python_train import UserError
from python_train.metrics.preprocess import resize_bicubic

RESOLUTION = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Shape(NamedTuple):
    """Size of a vision transformer; ``positions`` are those along a side of its table."""

    dim: int
    depth: int
    patch: int = 14
    positions: int = 37
    head_dim: int = 64


VIT_L14 = Shape(dim=1024, depth=24)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.qkv, self.proj = nn.Linear(shape.dim, 3 * shape.dim), nn.Linear(shape.dim, shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TransformerBlock(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6), nn.LayerNorm(shape.dim, eps=1e-6)
        self.attn, self.mlp = Attention(shape), MLP(shape.dim)
        self.ls1, self.ls2 = LayerScale(shape.dim), LayerScale(shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, shape.dim, shape.patch, shape.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DINOv2(nn.Module):
    """Normalised RGB [N,3,224,224] to the class token after the last normalisation, [N, dim]. Names are the file's."""

    def __init__(self, shape: Shape = VIT_L14) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.positions**2, shape.dim))
        self.patch_embed = PatchEmbedding(shape)
        self.blocks = nn.ModuleList(TransformerBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.dim, eps=1e-6)

    def positions(self, side: int) -> Tensor:
        """The table of positions for side×side patches: resized bicubic, without antialiasing.

        As in the original, the factor is made of 0.1 more than the patches there are, so that rounding cannot lose one.
        """
        own, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        known = isqrt(patches.shape[1])
        if side == known:
            return self.pos_embed
        factor = (side + 0.1) / known
        table = patches.reshape(1, known, known, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
        return torch.cat([own, table.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = tokens + self.positions(isqrt(tokens.shape[1] - 1))
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    def features(self, rgb: Tensor) -> Tensor:
        """RGB of any size with values 0..255 to features [N, dim]."""
        mean, std = (torch.tensor(values, device=rgb.device).reshape(1, 3, 1, 1) for values in (_MEAN, _STD))
        return self((resize_bicubic(rgb, RESOLUTION) / 255 - mean) / std)


def from_state_dict(tensors: Mapping[str, Tensor], where: str, shape: Shape = VIT_L14) -> DINOv2:
    """The network with the weights of the published file (``dinov2_vitl14_pretrain.pth``).

    Raises UserError, starting with ``where``, if they are those of another network.
    """
    with torch.device("meta"):
        net = DINOv2(shape)
    state = {name: value for name, value in tensors.items() if name != "mask_token"}
    expected = {name: value.shape for name, value in net.state_dict().items()}
    for name in sorted(expected.keys() | state.keys()):
        if name not in expected or name not in state or state[name].shape != expected[name]:
            raise UserError(
                f"{where} is not DINOv2 ViT-L/14 without registers: its tensor {name} is missing, unknown or misshapen"
            )
    net.load_state_dict({name: value.to(torch.float32) for name, value in state.items()}, assign=True)
    return net
