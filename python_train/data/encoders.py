"""Encoders: from stored arrays to the network's domain and back (spec 1.1, 1.2)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from python_train import UserError

SIGMA_DATA = 0.5
# Channel statistics of sd-vae-ft-mse posterior means over ImageNet-512 (spec 1.2).
VAE_MEAN = (5.81, 3.25, 0.12, -2.15)
VAE_STD = (4.17, 4.62, 3.71, 3.28)


class Encoder(Protocol):
    """Maps stored arrays to the network's domain and back; :func:`open_encoder` rebuilds it from its ``facts()``."""

    def encode(self, stored: Tensor) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...

    def facts(self) -> dict[str, Any]: ...


class PixelEncoder:
    """Full-range uint8 images: ``z = p / 127.5 - 1`` (spec 1.1)."""

    def encode(self, stored: Tensor) -> Tensor:
        """uint8 [N, C, H, W] to float32 in [-1, 1]."""
        return stored.to(torch.float32) / 127.5 - 1

    def decode(self, z: Tensor) -> Tensor:
        """Float [N, C, H, W] to uint8, truncating ``z * 127.5 + 128``; exact on every encoded value."""
        return (z.to(torch.float32) * 127.5 + 128).clip(0, 255).to(torch.uint8)

    def facts(self) -> dict[str, Any]:
        return {"kind": "pixel"}


class StandardizedEncoder:
    """uint8 images of unusual statistics, shifted to mean 0 and scaled to standard deviation sigma_data = 0.5."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean = mean
        self.std = std

    def encode(self, stored: Tensor) -> Tensor:
        """uint8 [N, C, H, W] to float32 with the data set's mean 0 and std 0.5."""
        return (stored.to(torch.float32) - self.mean) * (SIGMA_DATA / self.std)

    def decode(self, z: Tensor) -> Tensor:
        """Float [N, C, H, W] to uint8, rounding; exact on every encoded value."""
        return (z.to(torch.float32) * (self.std / SIGMA_DATA) + (self.mean + 0.5)).clip(0, 255).to(torch.uint8)

    def facts(self) -> dict[str, Any]:
        return {"kind": "standardized", "mean": self.mean, "std": self.std}


class LatentEncoder:
    """VAE posteriors stored as mean and std [N, 2C, H, W] float32: a fresh sample, whitened to std 0.5 (spec 1.2)."""

    def __init__(self, mean: tuple[float, ...] = VAE_MEAN, std: tuple[float, ...] = VAE_STD) -> None:
        self.mean = tuple(mean)
        self.std = tuple(std)

    def _affine(self, device: torch.device) -> tuple[Tensor, ...]:
        scale = np.float32(SIGMA_DATA) / np.float32(self.std)
        bias = np.float32(0) - np.float32(self.mean) * scale
        return tuple(torch.from_numpy(value).to(device).reshape(1, -1, 1, 1) for value in (scale, bias))

    def encode(self, stored: Tensor) -> Tensor:
        """One posterior sample per image, drawn from the device's global generator: [N, C, H, W] float32."""
        mean, std = stored.to(torch.float32).chunk(2, dim=1)
        scale, bias = self._affine(stored.device)
        return (mean + std * torch.randn_like(mean)) * scale + bias

    def decode(self, z: Tensor) -> Tensor:
        """Undo the whitening: the VAE's own latents [N, C, H, W] float32 (making pixels of them takes the VAE)."""
        scale, bias = self._affine(z.device)
        return (z.to(torch.float32) - bias) / scale

    def facts(self) -> dict[str, Any]:
        return {"kind": "latent", "mean": list(self.mean), "std": list(self.std)}


def open_encoder(facts: dict[str, Any]) -> Encoder:
    """The encoder described by ``facts`` (as found in a snapshot's header). Raises UserError if the kind is unknown."""
    kinds = {"pixel": PixelEncoder, "standardized": StandardizedEncoder, "latent": LatentEncoder}
    arguments = dict(facts)
    kind = arguments.pop("kind", None)
    if kind not in kinds:
        raise UserError(f"unknown encoder kind {kind!r}; known are {', '.join(kinds)}")
    return kinds[kind](**arguments)
