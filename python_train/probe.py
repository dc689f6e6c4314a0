"""What training is watched by: the same few images, labels and noise of the data set at every status."""

from __future__ import annotations

import torch

from python_train import data, magnitudes, noise_levels
from python_train.network import Precond


class Probe:
    """Images of a data set with fixed noise: what a network's magnitudes and errors are measured on. They are spread
    over the set evenly, because many are in the order of their classes."""

    def __init__(
        self,
        dataset: data.Dataset,
        encoder: data.Encoder,
        device: torch.device,
        sigmas: list[float],
        images: int = 32,
    ) -> None:
        images = min(images, dataset.num_images)
        self.indices = [number * dataset.num_images // images for number in range(images)]
        self.dataset = dataset
        self.encoder = encoder
        self.device = device
        self.sigmas = sigmas

    def measure(self, net: Precond) -> tuple[list[magnitudes.Bucket], list[noise_levels.NoiseLevel]]:
        """The network as it is, unaveraged: magnitudes, for all images once, sigma log-normal around the loss's; and
        errors at each of ``sigmas``."""
        stored = torch.stack([torch.from_numpy(self.dataset.read(i)) for i in self.indices]).to(self.device)
        labels = torch.stack([torch.as_tensor(self.dataset.label(i)) for i in self.indices]).to(self.device)
        generator = torch.Generator().manual_seed(0)
        images = self.encoder.encode(stored)
        sigma = (torch.randn(len(images), generator=generator) * 1.4 - 0.6).exp().to(self.device)
        noise = torch.randn(images.shape, generator=generator).to(self.device)
        buckets = magnitudes.measure(net, images + sigma.reshape(-1, 1, 1, 1) * noise, sigma, labels)
        return buckets, noise_levels.measure(net, images, labels, self.sigmas, noise)
