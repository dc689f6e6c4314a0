"""Encode a data set of images by a VAE: mean and standard deviation of each image's posterior (spec 1.2, 8.4)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tqdm

from python_train import UserError
from python_train.data.container import Index, Statistics, item_name
from python_train.data.convert import find_kept_labels
from python_train.data.encoders import VAE_MEAN, VAE_STD
from python_train.data.images import MAX_CHANNELS
from python_train.data.reader import ImageArchive, describe_shape
from python_train.data.staging import Staging, chunked, open_chunk, write_chunk
from python_train.data.statistics import Moments
from python_train.data.stream import read_ahead, whole_batch
from python_train.world import World

CHUNK = 256
_MOMENTS = "moments.json"
_POLL_SECONDS = 0.2


class Encoded(NamedTuple):
    """What was encoded: items, their shape [2C, H, W], the statistics stored with them, and a remark on the labels."""

    written: int
    shape: tuple[int, ...]
    statistics: Statistics
    remark: str


def open_vae(name: str, subfolder: str | None = None) -> torch.nn.Module:
    """A VAE of diffusers, by its name on the hub or by the path of a folder, in fp32. Raises UserError if diffusers is
    not installed, and for what is no VAE."""
    try:
        import diffusers
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "diffusers"
        why = "is missing" if missing else f"cannot be imported ({str(error).strip().splitlines()[0]})"
        raise UserError(f"VAEs are read by diffusers, which {why}: pip install 'edm2ext[vae]'") from error
    try:
        vae = diffusers.AutoModel.from_pretrained(
            name, subfolder=subfolder, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # of the hub, the network, the file, the configuration
        raise UserError(f"the VAE {name} cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    if not hasattr(vae, "encode"):
        raise UserError(f"{name} is a {type(vae).__name__}, not a VAE")
    return vae


def encode(
    source_path: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    vae: torch.nn.Module,
    vae_name: str,
    batch: int = 8,
    workers: int = 2,
    imagenet_statistics: bool = False,
    world: World | None = None,
    progress: bool = False,
) -> Encoded | None:
    """Make the data set ``dest`` of the latents of ``source_path``, RGB images of one size; labels are kept.

    ``vae``, in fp32, is called as ``vae.encode(pixels)`` with [N, 3, H, W] in [0, 1]; its result's ``latent_dist`` has
    ``mean`` and ``std`` [N, C, H', W'], which become one float32 array [2C, H', W'] an image. Statistics to whiten them
    by are measured and stored; or ImageNet's, as published. The processes of ``world`` share the work; the first one
    finishes it, the others return None. An interrupted call is continued by the same
    call. Raises UserError for images or a VAE that do not fit.
    """
    world = world or World()
    dataset = ImageArchive(source_path, cond=False)
    if dataset.dtype != np.uint8 or dataset.channels != 3:
        shape = describe_shape(dataset.shape, dataset.dtype)
        raise UserError(f"{source_path} holds images of {shape}; a VAE takes RGB: convert them first")
    labels, class_names, remark = find_kept_labels(dataset.source, dataset.names)
    vae = vae.to(world.device).eval().requires_grad_(False)
    shape = _encode_batch(vae, dataset.__getitems__([0])[0], world.device)[0].shape
    _check_shape(shape, dataset.shape, vae_name, imagenet_statistics)

    fingerprint = _fingerprint(vae)
    with Staging(dest, owner=world.rank == 0) as staging:
        parts = list(chunked(range(dataset.num_images), CHUNK))
        chunks = [
            staging.chunk(
                number, (fingerprint, [(dataset.names[i], dataset.source.signature(dataset.names[i])) for i in part])
            )
            for number, part in enumerate(parts)
        ]
        todo = [number for number, chunk in enumerate(chunks) if not chunk.exists()]
        if world.size > 1:
            torch.distributed.barrier()  # all have seen what there is to do before the first can be done with it
        mine = todo[world.rank :: world.size]
        _encode_chunks(
            dataset, vae, [parts[n] for n in mine], [chunks[n] for n in mine], batch, workers, world, progress
        )
        if world.rank > 0:
            return None
        while not all(chunk.exists() for chunk in chunks):  # of the other processes; torchrun ends all if one fails
            time.sleep(_POLL_SECONDS)
        statistics = Statistics(VAE_MEAN, VAE_STD) if imagenet_statistics else _statistics(chunks)
        names = [item_name(i, ".npy", "img-mean-std-") for i in range(dataset.num_images)]
        staging.finish(
            zip(names, _contents(chunks), strict=True),
            lambda: Index(
                None if labels is None else [(new, labels[old]) for new, old in zip(names, dataset.names, strict=True)],
                class_names,
                statistics,
                f"latents of {dataset.name} by {vae_name}",
            ),
        )
    return Encoded(dataset.num_images, tuple(shape), statistics, remark)


def _encode_batch(vae: Any, images: torch.Tensor, device: torch.device) -> np.ndarray:
    """uint8 [N, 3, H, W] to mean and standard deviation, float32 [N, 2C, H', W']."""
    pixels = images.to(device).to(torch.float32) / 255
    with torch.no_grad():
        posterior = getattr(vae.encode(pixels), "latent_dist", None)
        if not (hasattr(posterior, "mean") and hasattr(posterior, "std")):
            raise UserError(f"{type(vae).__name__} gives no Gaussian posterior: it is not a KL autoencoder")
        return torch.cat([posterior.mean, posterior.std], dim=1).to("cpu", torch.float32).numpy()


def decode(vae: Any, latents: torch.Tensor, batch: int = 4) -> torch.Tensor:
    """Latents [N, C, H, W] as the VAE has them (not whitened) to images uint8 [N, 3, 8H, 8W], ``batch`` at a time: its
    output in [0, 1], cut to that range, times 255, truncated (spec 1.2)."""
    with torch.no_grad():
        pixels = torch.cat([vae.decode(part).sample for part in latents.split(batch)])
    return (pixels.clamp(0, 1) * 255).to(torch.uint8)


def _check_shape(latents: Sequence[int], images: Sequence[int], name: str, imagenet_statistics: bool) -> None:
    if images[1] % latents[1] or images[2] % latents[2] or images[1] // latents[1] != images[2] // latents[2]:
        raise UserError(
            f"images of {images[1]}x{images[2]} are not divisible by the factor of the VAE {name}: "
            f"it makes {latents[1]}x{latents[2]} of them"
        )
    if latents[0] > 2 * MAX_CHANNELS:
        raise UserError(f"the VAE {name} has {latents[0] // 2} channels; at most {MAX_CHANNELS} are supported")
    if imagenet_statistics and latents[0] != 2 * len(VAE_MEAN):
        raise UserError(
            f"ImageNet's statistics are for {len(VAE_MEAN)} channels, but the VAE {name} has {latents[0] // 2}"
        )


def _fingerprint(vae: torch.nn.Module) -> str:
    """A digest of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _encode_chunks(
    dataset: ImageArchive,
    vae: torch.nn.Module,
    parts: Sequence[Sequence[int]],
    chunks: Sequence[Path],
    batch: int,
    workers: int,
    world: World,
    progress: bool,
) -> None:
    """Encode the items ``parts[k]`` into ``chunks[k]``, each with its sums for the statistics."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=[list(indices) for part in parts for indices in chunked(part, batch)],
        num_workers=workers,
        collate_fn=whole_batch,
        pin_memory=world.device.type == "cuda",
    )
    arrays = (array for images, _ in read_ahead(loader) for array in _encode_batch(vae, images, world.device))
    total = sum(map(len, parts))
    with tqdm.tqdm(total=total, desc="encoding", unit="img", disable=not progress or world.rank > 0) as bar:
        for part, chunk in zip(parts, chunks, strict=True):
            write_chunk(chunk, _encoded(dataset, part, arrays, bar))


def _encoded(
    dataset: ImageArchive, part: Sequence[int], arrays: Iterator[np.ndarray], bar: tqdm.tqdm
) -> Iterator[tuple[str, bytes]]:
    moments = Moments()
    for index in part:
        array = next(arrays)
        if not np.isfinite(array).all():
            raise UserError(f"{dataset.path}: the latents of {dataset.names[index]} are not finite")
        moments.add(array)
        file = io.BytesIO()
        np.lib.format.write_array(file, array, version=(1, 0))
        yield f"{index:08d}.npy", file.getvalue()
        bar.update()
    yield _MOMENTS, json.dumps(moments.to_json()).encode()


def _statistics(chunks: Sequence[Path]) -> Statistics:
    total = Moments()
    for chunk in chunks:
        total.merge(Moments.from_json(json.loads(open_chunk(chunk).read(_MOMENTS))))
    return total.statistics()


def _contents(chunks: Sequence[Path]) -> Iterator[bytes]:
    for chunk in chunks:
        source = open_chunk(chunk)
        yield from (source.read(name) for name in source.names if name != _MOMENTS)
