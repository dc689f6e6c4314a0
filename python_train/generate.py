"""Command ``python -m python_train.generate``: draw images from snapshots, one PNG per seed.

Images appear whole or not at all, beside ``options.json``, which says what they were made with; the same command again
draws what is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from python_train import UserError
from python_train.command_line import device_options, reported
from python_train.data import Encoder
from python_train.guidance import Guide
from python_train.image_job import GuideFile, Job, folders_of, save_image
from python_train.network import Precond
from python_train.pictures import image_grid, save_png
from python_train.sample import SeededRandom, sample
from python_train.sampling_options import (
    chosen_networks,
    guidance_options,
    network_options,
    sampler_options,
    vae_option,
)
from python_train.world import World, open_world

LARGEST_GRID = 1024
LARGEST_SEED, MOST_SEEDS = 2**32 - 1, 10_000_000  # larger ones repeat smaller ones (`SeededRandom`)


def parse_seeds(text: str) -> list[int]:
    """Seeds of a list such as ``0-63,100``: numbers and inclusive ranges, in order, each once.

    UserError otherwise, for seeds that are too large to differ from smaller ones, and for too many.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"seeds: expected numbers and ranges such as 0-63,100, got {text!r}")
        numbers = range(int(first), int(last or first) + 1)
        if not numbers:
            raise UserError(f"seeds: the range {part.strip()!r} is empty; write the smaller number first")
        if numbers[-1] > LARGEST_SEED:
            raise UserError(f"seeds: the largest is {LARGEST_SEED}, got {part.strip()!r}")
        if len(seeds) + len(numbers) > MOST_SEEDS:
            raise UserError(f"seeds: at most {MOST_SEEDS:,} at a time, got more by {part.strip()!r}")
        seeds.extend(numbers)
    return list(dict.fromkeys(seeds))


def seed_batches(seeds: Sequence[int], batch: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """This process's share of the seeds: nearly equal contiguous chunks of at most ``batch``, dealt in turn (spec 6.4).

    The number of chunks is a multiple of the number of processes; empty ones are left out.
    """
    rounds = -(-len(seeds) // (batch * world_size))
    chunks = np.array_split(np.asarray(seeds, dtype=object), max(rounds, 1) * world_size)
    return [list(chunk) for chunk in chunks[rank::world_size] if len(chunk)]


def generate_batch(
    net: Precond,
    encoder: Encoder,
    seeds: Sequence[int],
    classes: int | Sequence[int] | None = None,
    guides: Sequence[Guide] = (),
    **sampler: Any,
) -> Tensor:
    """Images of the given seeds, uint8 [N,C,H,W] (latents: float32) on the network's device.

    Each image depends on its own seed alone (up to kernel numerics): its noise, then its class, then its churn noise
    come from one generator (spec 6.4). ``classes`` overrides the drawn class, for all images or one by one, and does
    not change the noise. ``sampler`` goes to :func:`python_train.sample.sample`. Raises ValueError for classes that do
    not exist.
    """
    device = next(net.parameters()).device
    random = SeededRandom(seeds, device)
    noise = random.randn([net.img_channels, net.img_resolution, net.img_resolution])
    labels = None
    if net.label_dim > 0:
        chosen = random.randint(net.label_dim)
        if classes is not None:
            chosen = torch.as_tensor(classes, device=device).expand(len(seeds))
        if not bool(((chosen >= 0) & (chosen < net.label_dim)).all()):
            raise ValueError(f"generate_batch: classes must be in 0..{net.label_dim - 1}, got {classes}")
        labels = torch.nn.functional.one_hot(chosen, net.label_dim).to(torch.float32)
    elif classes is not None:
        raise ValueError("generate_batch: the network is unconditional, it has no classes")
    with torch.no_grad():
        latents = sample(net, noise, labels, guides, randn_like=random.randn_like, **sampler)
        return encoder.decode(latents.to(torch.float32))


def generate(
    net_paths: Sequence[Path],
    outdir: Path,
    seeds: Sequence[int],
    *,
    class_idx: int | None = None,
    guides: Sequence[GuideFile] = (),
    batch: int = 32,
    subdirs: bool = False,
    grid: Path | None = None,
    overwrite: bool = False,
    vae: str | None = None,
    world: World | None = None,
    **sampler: Any,
) -> list[Path]:
    """Write one PNG per seed and network (this process's share of them).

    Latents are decoded by ``vae``, a name or folder for diffusers; without one they are written as .npy (float32), and
    so are pixels of 5 or more channels (uint8).

    Images that are there whole and were made with the same options are kept; damaged ones among them are drawn anew.
    With several networks each has a folder of its own in ``outdir``. ``grid`` is where to draw a table of all images,
    with a row for each network if there are several. ``sampler`` goes to :func:`python_train.sample.sample`.

    Returns the paths of this process's share. Raises UserError or ValueError before anything is written: see `Job`,
    `parse_seeds` and `sample`; also for a grid that exists, would be too large or cannot show what is no picture.
    """
    world = world or World()
    check_sampler(guides, sampler)
    jobs = [
        Job(net_path, folder, seeds, world.device, class_idx, guides, sampler, subdirs, overwrite, vae)
        for net_path, folder in zip(net_paths, folders_of(net_paths, outdir), strict=True)
    ]
    if grid is not None:
        check_grid(grid, jobs, outdir, overwrite)
    share = [seed for chunk in seed_batches(seeds, batch, world.rank, world.size) for seed in chunk]
    todo = [job.missing(share) for job in jobs]
    for job in jobs if world.rank == 0 else ():
        job.remove_leftovers()
    world.wait()  # nobody writes before everybody has looked

    there = len(share) * len(jobs) - sum(map(len, todo))
    with tqdm(total=len(share) * len(jobs), initial=there, unit="image", disable=world.rank != 0) as progress:
        for job, missing in zip(jobs, todo, strict=True):
            draw(job, seed_batches(missing, batch), class_idx, sampler, world, progress)
    world.wait()
    if grid is not None and world.rank == 0:
        save_png(grid, draw_grid(jobs))
    return [job.paths[seed] for job in jobs for seed in share]


def draw(
    job: Job,
    batches: Sequence[Sequence[int]],
    class_idx: int | None,
    sampler: dict[str, Any],
    world: World,
    progress: tqdm,
) -> None:
    """Draw the images of the seeds and write them; loads nothing if there are none."""
    with contextlib.ExitStack() as stack:
        if batches:
            net, guides = stack.enter_context(job.networks(world.device))
            decode = job.decoder(world.device)
        job.make_folders()
        if world.rank == 0:
            job.write_options()
        world.wait()  # no image without them
        for chunk in batches:
            images = decode(generate_batch(net, job.encoder, chunk, class_idx, guides, **sampler))
            for seed, image in zip(chunk, images.cpu().numpy(), strict=True):
                save_image(job.paths[seed], image)
            progress.update(len(chunk))


def check_sampler(guides: Sequence[GuideFile], sampler: dict[str, Any]) -> None:
    """Raise ValueError for settings that the sampler would refuse, by letting it sample one number."""

    def net(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        return x

    sample(net, torch.zeros(1), guides=[Guide(net, guide.weight, guide.interval) for guide in guides], **sampler)


def check_grid(path: Path, jobs: Sequence[Job], outdir: Path, overwrite: bool) -> None:
    """Raise UserError if the picture of all images cannot be drawn, or would replace a file without being asked to."""
    count = sum(len(job.paths) for job in jobs)
    if path.exists() and not overwrite:
        raise UserError(f"the grid {path} exists already; name another file, or remove it")
    if not path.parent.is_dir() and path.parent.resolve() != outdir.resolve():
        raise UserError(f"the folder of the grid {path} does not exist")
    for job in jobs:
        if job.encoder.facts()["kind"] == "latent" and job.vae is None:
            raise UserError("a grid shows images, and these are latents: leave --latents out")
        if not job.drawable:
            raise UserError(
                f"a grid shows images of 1 to 4 channels, and {job.net_path} makes {job.drawn[0]}: leave --grid out"
            )
    if count > LARGEST_GRID:
        raise UserError(f"a grid of {count} images is too large; name {LARGEST_GRID} seeds or fewer")
    if len({job.drawn for job in jobs}) > 1:
        raise UserError("a grid needs networks of one image size")


def draw_grid(jobs: Sequence[Job]) -> Image.Image:
    """A table of the images, read from their files: about as many rows as columns, or a row for each network."""
    rows = [np.stack([_read_png(path) for path in job.paths.values()]) for job in jobs]
    if len(jobs) > 1:
        return image_grid(np.stack(rows), [job.folder.name for job in jobs])
    images = rows[0]
    columns = ceil(sqrt(len(images)))
    blank = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
    return image_grid(np.concatenate([images, blank]).reshape(-1, columns, *images.shape[1:]))


def _read_png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


_EPILOG = """\b
Examples:
  Eight images of class 3:
    python -m python_train.generate --net RUN/phema-0000131-0.100.safetensors --outdir out --seeds 0-7 --class 3
  Autoguidance, by an earlier snapshot of a smaller network:
    python -m python_train.generate --net NET --gnet SMALLER --guidance 2.1 --outdir out --seeds 0-63
  Classifier-free guidance, by an unconditional network, in steps 15 to 21 only:
    python -m python_train.generate --net NET --gnet UNCOND --guidance 2.1 --guidance-interval 15-21 \\
        --outdir out --seeds 0-63
  Both at once, a third of the weight on the second guide:
    python -m python_train.generate --net NET --gnet UNCOND --gnet SMALLER --guidance 2 --guidance-blend 0.33 \\
        --outdir out --seeds 0-63
  The same seeds from two networks, side by side in one picture:
    python -m python_train.generate --net A --net B --outdir out --seeds 0-15 --grid compare.png
  With published weights, which lie in the folder weights/ (else it says which to fetch):
    python -m python_train.generate --preset edm2-img512-s-interval-dino --outdir out --seeds 0-63
  50,000 images on eight GPUs:
    torchrun --standalone --nproc_per_node=8 -m python_train.generate --net NET --outdir out --subdirs \\
        --seeds 0-49999 --batch 64

An image depends on its seed and the options, not on the batch or the number of processes (but for the last bits of
floating-point sums); CPU and GPU draw different noise. The folder's options.json says what its images were made
with. The same command again draws what is missing or damaged; other options are refused.
"""
_PATH = click.Path(path_type=Path)


@click.command(epilog=_EPILOG, context_settings={"show_default": True, "max_content_width": 120})
@network_options(several="Several: a folder for each.")
@click.option("--outdir", type=_PATH, required=True, help="Folder for the images; made if missing.")
@click.option("--seeds", required=True, help="One image per seed: numbers and ranges, such as 0-63,100.")
@click.option("--class", "class_idx", type=int, help="Draw this class only.  [default: a random class per seed]")
@click.option("--grid", type=_PATH, help="Draw all images into this PNG as well: a table, or a row for each network.")
@guidance_options
@sampler_options
@vae_option
@click.option("--latents", is_flag=True, help="Write latents as .npy, not decoded.")
@device_options(32)
@click.option("--subdirs", is_flag=True, help="A folder per 1000 seeds.")
@click.option("--overwrite", is_flag=True, help="Replace images that exist already.")
def main(
    device: str | None,
    seeds: str,
    net_paths: tuple[Path, ...],
    preset: str | None,
    weights: str,
    gnet_paths: tuple[Path, ...],
    guidance: tuple[str, ...],
    guidance_blend: float | None,
    guidance_interval: tuple[str, ...],
    vae: str,
    latents: bool,
    **options: Any,
) -> None:
    """Draw images from a trained network: {seed:06d}.png for every seed, or .npy [C,H,W] with more than 4 channels."""
    with reported("interrupted; the same command draws the rest"):
        numbers = parse_seeds(seeds)
        with open_world(device) as world:
            net_paths, guides = chosen_networks(
                net_paths, preset, weights, gnet_paths, guidance, guidance_blend, guidance_interval, world
            )
            decoded_by = None if latents else vae
            generate(net_paths, seeds=numbers, guides=guides, vae=decoded_by, world=world, **options)
            if world.rank == 0:
                click.echo(f"{len(numbers) * len(net_paths)} images in {options['outdir']}")


if __name__ == "__main__":
    main()
