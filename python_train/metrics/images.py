"""Where images come from: a data set, or a network that draws them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from python_train import UserError
from python_train.checkpoint import load_snapshot, read_header
from python_train.data import Dataset, Encoder, open_dataset, open_encoder
from python_train.data.latents import decode, open_vae
from python_train.data.stream import read_ahead, whole_batch
from python_train.generate import check_sampler, generate_batch
from python_train.guidance import Guide
from python_train.image_job import GuideFile, check_guide
from python_train.metrics.passes import Indices
from python_train.network import Precond
from python_train.reconstruct import find_snapshots, reconstruct, target_time, warnings_of


def open_images(path: str) -> Dataset:
    """A data set of uint8 images without its labels. UserError for one of latents."""
    dataset = open_dataset(path, cond=False)
    if dataset.dtype != np.uint8:
        raise UserError(f"{path} holds latents: metrics compare images, name the data set they were encoded from")
    return dataset


def dataset_images(dataset: Dataset, batches: Sequence[Indices], workers: int = 2) -> Iterator[Tensor]:
    """The images of each batch, uint8 [N,C,H,W], read ahead by ``workers`` processes."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=[batch.tolist() for batch in batches],
        num_workers=workers,
        collate_fn=whole_batch,
    )
    return (images for images, _ in read_ahead(loader))


@dataclass(frozen=True)
class Stored:
    """A network on disk: a snapshot, or a run's folder of which one average is reconstructed."""

    path: Path
    sigma_rel: float | None = None
    kimg: int | None = None

    def header(self) -> dict[str, Any]:
        """What is known of it without reading its weights. Raises UserError if it is not there or not whole, and where
        sigma_rel is missing for a folder or superfluous for a file."""
        if not self.path.is_dir():
            if self.sigma_rel is not None or self.kimg is not None:
                raise UserError(f"{self.path} is one network; an EMA length and a time are for a run's folder")
            return read_header(self.path)
        if self.sigma_rel is None:
            raise UserError(f"{self.path} is a folder: name the EMA length sigma_rel of the network to make of it")
        snapshots = find_snapshots(self.path)
        return {**snapshots[0].header, "nimg": self.time(snapshots), "sigma_rel": self.sigma_rel, "ema_kind": "phema"}

    def time(self, snapshots: Sequence[Any]) -> int:
        """The training time in images, of a run with these snapshots. UserError if none was taken then."""
        at_kimg = [snapshot.nimg for snapshot in snapshots if snapshot.nimg // 1000 == self.kimg]
        return target_time(snapshots, None if self.kimg is None else (at_kimg or [self.kimg * 1000])[0])

    def load(self, device: torch.device) -> Precond:
        """The network, on a device."""
        if self.sigma_rel is None:
            return load_snapshot(self.path, device)[0]
        snapshots = find_snapshots(self.path)
        (result,) = reconstruct(snapshots, [self.sigma_rel], self.time(snapshots))
        return result.net.to(device)

    def facts(self) -> dict[str, Any]:
        """What a table of results says of it."""
        header = self.header()
        return {"file": str(self.path), "nimg": header["nimg"], "sigma_rel": header["sigma_rel"]}


def reconstruction_warnings(networks: Iterable[Stored]) -> list[str]:
    """What the snapshots of runs cannot support among these networks."""
    widths: dict[tuple[Path, int | None], set[float]] = {}
    for network in networks:
        if network.sigma_rel is not None:
            widths.setdefault((network.path, network.kimg), set()).add(network.sigma_rel)
    found = []
    for (path, kimg), chosen in widths.items():
        snapshots = find_snapshots(path)
        nimg = Stored(path, kimg=kimg).time(snapshots)
        found += [f"{path}: {text}" for text in warnings_of(snapshots, sorted(chosen), nimg)]
    return found


@dataclass(frozen=True)
class StoredGuide:
    """A guide on disk, see `python_train.guidance.Guide`."""

    network: Stored
    file: GuideFile


class Drawing:
    """Images that a network draws, one for each seed.

    Raises UserError before anything is loaded: for networks that are missing, damaged or do not fit each other, a class
    that does not exist, and sampler settings out of range.
    """

    def __init__(
        self,
        network: Stored,
        guides: Sequence[StoredGuide],
        seeds: Sequence[int],
        class_idx: int | None,
        sampler: dict[str, Any],
        vae: str,
    ) -> None:
        self.network, self.guides, self.class_idx, self.sampler, self.vae = network, guides, class_idx, sampler, vae
        self.seeds = np.asarray(seeds, dtype=np.int64)
        header = network.header()
        config = header["config"]
        if class_idx is not None and not 0 <= class_idx < config["label_dim"]:
            raise UserError(f"class {class_idx} does not exist: {network.path} has {config['label_dim']} classes")
        for guide in guides:
            check_guide(header, guide.network.header())
        check_sampler([guide.file for guide in guides], sampler)
        self.encoder: Encoder = open_encoder(header["encoder"])
        self.is_latent = header["encoder"]["kind"] == "latent"
        # Of the images; unknown where a VAE makes them.
        self.shape = None if self.is_latent else (config["img_channels"], *[config["img_resolution"]] * 2)

    def facts(self) -> dict[str, Any]:
        """What the results say they are of."""
        guides = [{**guide.network.facts(), **guide.file.settings()} for guide in self.guides]
        return {**self.network.facts(), "guides": guides, "class": self.class_idx}

    def images(self, batches: Sequence[Indices], device: torch.device) -> Iterator[Tensor]:
        """The images of each batch of indices into the seeds: uint8 [N,C,H,W] on the device."""
        if not batches:
            return
        vae = open_vae(self.vae).to(device).eval().requires_grad_(False) if self.is_latent else None
        with contextlib.ExitStack() as stack:

            def baked(network: Stored) -> Precond:
                net = network.load(device)
                stack.enter_context(net.baked())
                return net

            net = baked(self.network)
            guides = [Guide(baked(g.network), g.file.weight, g.file.interval) for g in self.guides]
            for batch in batches:
                seeds = self.seeds[batch].tolist()
                drawn = generate_batch(net, self.encoder, seeds, self.class_idx, guides, **self.sampler)
                yield drawn if vae is None else decode(vae, drawn)
