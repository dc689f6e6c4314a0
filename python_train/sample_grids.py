"""Images drawn during training: a grid for each tracked average, the same seeds every time, and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil

import torch
from PIL import Image
from torch import Tensor

from python_train import UserError, data
from python_train.config import TrainOptions
from python_train.data import latents
from python_train.metrics import FeatureExtractor, ReferenceFeatures, feature_extractor, score
from python_train.network import Precond
from python_train.pictures import image_grid
from python_train.sample import SeededRandom, sample
from python_train.trainer import Trainer

ROWS, COLUMNS = 4, 8
REFERENCE_IMAGES = 10_000  # of the data set, at most
SHOWN_METRICS = ("fd", "kid")


def image_decoder(
    dataset: data.Dataset, encoder: data.Encoder, vae: str | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """From the network's domain to uint8 images [N, C, H, W] with 1 or 3 channels.

    Latents take the VAE that they were made by, a name or folder for diffusers. Raises UserError where it is not given
    or cannot be read, and for data that are no pictures.
    """
    if encoder.facts()["kind"] == "latent":
        if vae is None:
            raise UserError("--sample draws images, and the data are latents: name the VAE that decodes them by --vae")
        net = latents.open_vae(vae).to(device).eval().requires_grad_(False)
        return lambda z: latents.decode(net, encoder.decode(z))
    if dataset.shape[0] not in (1, 3):
        raise UserError(f"--sample draws grey or RGB images; the data have {dataset.shape[0]} channels")
    return encoder.decode


class SampleGrids:
    """Draws with the averages of a trainer. The first images have the labels of images of the data set, which are
    spread over it evenly, so that a set in order of its classes shows them in order.

    All processes call `draw`, rank 0 draws. With ``options.metric_images`` so many images of each average are compared
    with images of the data set by the features "efflite0" (`python_train.metrics`). Raises UserError where images or
    features cannot be made.
    """

    def __init__(
        self, options: TrainOptions, dataset: data.Dataset, encoder: data.Encoder, device: torch.device
    ) -> None:
        self.dataset = dataset
        self.encoder = encoder
        self.device = device
        self.decode = image_decoder(dataset, encoder, options.vae, device)
        self.images = max(ROWS * COLUMNS, options.metric_images)
        self.metric_images = options.metric_images
        self.metrics = _Metrics(dataset, self.decode_stored, device) if options.metric_images else None

    def decode_stored(self, stored: Tensor) -> Tensor:
        """Images of the data set as they would look if the network made them."""
        return self.decode(self.encoder.encode(stored))

    def draw(self, trainer: Trainer) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Metrics, such as "Metric/kid/0.050", and grids by EMA length; nothing on ranks other than 0."""
        metrics: dict[str, float] = {}
        grids: dict[str, Image.Image] = {}
        for sigma_rel, profile in zip(trainer.ema.sigma_rels, trainer.ema.profiles, strict=True):
            parameters = trainer.whole(profile)
            if trainer.world.rank == 0:
                images = torch.cat(list(self._images(_network(trainer, parameters), trainer.micro_batch)))
                if self.metrics is not None:
                    found = self.metrics.of(images[: self.metric_images])
                    metrics |= {f"Metric/{name}/{sigma_rel:.3f}": found[name] for name in SHOWN_METRICS}
                shown = images[: ROWS * COLUMNS].reshape(ROWS, COLUMNS, *images.shape[1:])
                title = f"{trainer.nimg // 1000}k images, EMA length {sigma_rel:g}"
                grids[f"{sigma_rel:.3f}"] = image_grid(shown.numpy(), title=title)
        return metrics, grids

    def _images(self, net: Precond, micro_batch: int) -> Iterator[Tensor]:
        """uint8 [n, C, H, W] on the CPU: image i is drawn from seed i (spec 6.1, 6.4)."""
        height, width = self.encoder.encode(torch.from_numpy(self.dataset.read(0))[None].to(self.device)).shape[2:]
        batch = min(self.images, micro_batch)
        with net.baked(), torch.no_grad():
            for start in range(0, self.images, batch):
                seeds = range(start, min(start + batch, self.images))
                noise = SeededRandom(seeds, self.device).randn([net.img_channels, height, width])
                yield self.decode(sample(net, noise, self._labels(seeds)).to(torch.float32)).cpu()

    def _labels(self, seeds: Sequence[int]) -> Tensor | None:
        if self.dataset.label_dim == 0:
            return None
        indices = [seed * self.dataset.num_images // self.images for seed in seeds]
        return torch.stack([torch.as_tensor(self.dataset.label(index)) for index in indices]).to(self.device)


def _network(trainer: Trainer, parameters: Sequence[Tensor]) -> Precond:
    """The trainer's network with these parameters, for sampling."""
    trained = trainer.net
    net = Precond(**trained.config).eval().requires_grad_(False)
    net.compute_dtype = trained.compute_dtype
    net.load_state_dict({**trained.state_dict(), **dict(zip(trainer.names, parameters, strict=True))})
    return net.to(trainer.world.device)


class _Metrics:
    """Compares images with those of the data set, of which the features are made once, when they are needed."""

    def __init__(self, dataset: data.Dataset, decode: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.dataset = dataset
        self.decode = decode
        self.device = device
        self.extractor: FeatureExtractor = feature_extractor("efflite0", device=device)
        self.reference: ReferenceFeatures | None = None

    def of(self, images: Tensor) -> dict[str, float]:
        """The metrics of uint8 images [N, C, H, W], see `python_train.metrics.measure`."""
        if self.reference is None:
            self.reference = ReferenceFeatures.of(torch.cat(list(self._real_features())))
        return score(torch.cat([self.extractor(part).cpu() for part in images.split(64)]), self.reference)

    def _real_features(self) -> Iterator[Tensor]:
        used = min(REFERENCE_IMAGES, self.dataset.num_images)
        indices = [number * self.dataset.num_images // used for number in range(used)]
        for part in range(ceil(used / 64)):
            stored = [torch.from_numpy(self.dataset.read(index)) for index in indices[64 * part : 64 * part + 64]]
            yield self.extractor(self.decode(torch.stack(stored).to(self.device))).cpu()
