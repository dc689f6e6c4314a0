"""Command ``python -m python_train.generate``: draw images from a snapshot, one PNG per seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from click.core import ParameterSource
from torch import Tensor
from tqdm import tqdm

from python_train import UserError
from python_train.checkpoint import atomic_write, load_snapshot
from python_train.data import Encoder, open_encoder
from python_train.network import Precond
from python_train.presets import find_preset
from python_train.report import save_png, to_pillow
from python_train.sample import SeededRandom, edm_sampler


def parse_seeds(text: str) -> list[int]:
    """Seeds of a list such as ``0-63,100``: numbers and inclusive ranges, in order, each once. UserError otherwise."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"seeds: expected numbers and ranges such as 0-63,100, got {text!r}")
        if dash and int(last) < int(first):
            raise UserError(f"seeds: the range {part.strip()!r} is empty; write the smaller number first")
        seeds.extend(range(int(first), int(last or first) + 1))
    return list(dict.fromkeys(seeds))


def seed_batches(seeds: Sequence[int], batch: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """This process's share of the seeds: nearly equal contiguous chunks of at most ``batch``, dealt in turn (spec 6.4).

    The number of chunks is a multiple of the number of processes; empty ones are left out.
    """
    rounds = -(-len(seeds) // (batch * world_size))
    chunks = np.array_split(np.asarray(seeds, dtype=object), max(rounds, 1) * world_size)
    return [list(chunk) for chunk in chunks[rank::world_size] if len(chunk)]


def check_guide(net: Precond, gnet: Precond) -> None:
    """Raise UserError unless gnet can guide net: same image shape, same classes or none (spec 6.2)."""
    shape = (net.img_channels, net.img_resolution)
    guide_shape = (gnet.img_channels, gnet.img_resolution)
    if shape != guide_shape:
        raise UserError(
            "the guide makes images of another shape: [channels, resolution] is "
            f"{list(guide_shape)}, the main network's {list(shape)}"
        )
    if gnet.label_dim not in (0, net.label_dim):
        raise UserError(f"the guide knows {gnet.label_dim} classes, the main network {net.label_dim}")


def generate_batch(
    net: Precond,
    encoder: Encoder,
    seeds: Sequence[int],
    classes: int | Sequence[int] | None = None,
    gnet: Precond | None = None,
    **sampler: Any,
) -> Tensor:
    """Images of the given seeds, uint8 [N,C,H,W] (latents: float32) on the network's device.

    Each image depends on its own seed alone (up to kernel numerics): its noise, then its class, then its churn noise
    come from one generator (spec 6.4). ``classes`` overrides the drawn class, for all images or one by one, and does
    not change the noise. ``sampler`` goes to :func:`python_train.sample.edm_sampler`. Raises ValueError for classes
    that do not exist.
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
        latents = edm_sampler(net, noise, labels, gnet, randn_like=random.randn_like, **sampler)
        return encoder.decode(latents.to(torch.float32))


def open_device(name: str | None) -> torch.device:
    """The device of that name, by default this process's GPU if there is one. UserError if it cannot be used."""
    name = name or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UserError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def image_path(outdir: Path, seed: int, subdirs: bool, suffix: str) -> Path:
    """Where the image of a seed goes: ``000123.png``, with subdirs ``000000/000123.png``."""
    folder = outdir / f"{seed // 1000 * 1000:06d}" if subdirs else outdir
    return folder / f"{seed:06d}{suffix}"


def save_image(path: Path, image: np.ndarray) -> None:
    """Write uint8 [C,H,W] as PNG, or latents float32 [C,H,W] as .npy, atomically."""
    if path.suffix == ".png":
        save_png(path, to_pillow(image))
        return
    with atomic_write(path) as temp, open(temp, "wb") as file:
        np.save(file, image)


def generate(
    net_path: Path,
    outdir: Path,
    seeds: Sequence[int],
    *,
    class_idx: int | None = None,
    gnet_path: Path | None = None,
    guidance: float = 1,
    batch: int = 32,
    device: str | torch.device = "cpu",
    subdirs: bool = False,
    overwrite: bool = False,
    rank: int = 0,
    world_size: int = 1,
    **sampler: Any,
) -> list[Path]:
    """Write one PNG per seed (this process's share of them) and return the paths; latents are written as .npy.

    Raises UserError for unreadable snapshots, a class the network does not have, guidance without a guide, a guide
    of another shape, or images that exist already, before anything is written.
    """
    if guidance != 1 and gnet_path is None:
        raise UserError(f"guidance {guidance:g} needs a guiding network: name its snapshot with --gnet")
    net, header = load_snapshot(net_path, device)
    if class_idx is not None and net.label_dim == 0:
        raise UserError(f"{net_path} is unconditional: it has no class {class_idx}")
    if class_idx is not None and not 0 <= class_idx < net.label_dim:
        raise UserError(f"class {class_idx} does not exist: {net_path} has classes 0 to {net.label_dim - 1}")
    gnet = None
    if gnet_path is not None and guidance != 1:
        gnet, _ = load_snapshot(gnet_path, device)
        check_guide(net, gnet)
    encoder = open_encoder(header["encoder"])
    suffix = ".npy" if header["encoder"]["kind"] == "latent" else ".png"

    batches = seed_batches(seeds, batch, rank, world_size)
    paths = {seed: image_path(outdir, seed, subdirs, suffix) for chunk in batches for seed in chunk}
    existing = [path for path in paths.values() if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{len(existing)} of the images exist already, such as {existing[0]}; use --overwrite")
    for folder in {path.parent for path in paths.values()}:
        folder.mkdir(parents=True, exist_ok=True)

    with tqdm(total=len(paths), unit="image", disable=rank != 0) as progress:
        for chunk in batches:
            images = generate_batch(net, encoder, chunk, class_idx, gnet, guidance=guidance, **sampler)
            for seed, image in zip(chunk, images.cpu().numpy(), strict=True):
                save_image(paths[seed], image)
            progress.update(len(chunk))
    return list(paths.values())


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option(
    "--net",
    "net_path",
    type=click.Path(path_type=Path),
    help="Snapshot of the network (.safetensors, or a .pkl of the EDM2 reference program, read without executing it).",
)
@click.option(
    "--preset",
    help="Published networks and guidance by name, such as edm2-img512-s-guid-dino, in the place of --net, --gnet and "
    "--guidance; any other word lists the names.",
)
@click.option(
    "--weights", type=click.Path(path_type=Path), default="weights", help="Folder of the networks that presets name."
)
@click.option(
    "--outdir", type=click.Path(path_type=Path), required=True, help="Folder for the images; made if missing."
)
@click.option("--seeds", required=True, help="One image per seed: numbers and ranges, such as 0-63,100.")
@click.option("--class", "class_idx", type=int, help="Draw this class only.  [default: a random class per seed]")
@click.option(
    "--gnet",
    "gnet_path",
    type=click.Path(path_type=Path),
    help="Snapshot of a guiding network: a smaller or less trained one, or an unconditional one.",
)
@click.option(
    "--guidance",
    type=float,
    default=1,
    help="Guidance strength; 1 = none, above 1 pushes away from what the guide would draw.",
)
@click.option(
    "--steps",
    "num_steps",
    type=click.IntRange(min=2),
    default=32,
    help="Sampling steps N; the network is evaluated 2N-1 times.",
)
@click.option("--sigma-min", type=float, default=0.002, help="Lowest noise level.")
@click.option("--sigma-max", type=float, default=80, help="Highest noise level.")
@click.option("--rho", type=float, default=7, help="Spacing of the noise levels; larger = more of them low.")
@click.option("--S-churn", "S_churn", type=float, default=0, help="Stochasticity; 0 = deterministic.")
@click.option("--S-min", "S_min", type=float, default=0, help="Lowest noise level with churn.")
@click.option("--S-max", "S_max", type=float, default=inf, help="Highest noise level with churn.")
@click.option("--S-noise", "S_noise", type=float, default=1, help="Inflation of the churn noise.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float64"]),
    default="float32",
    help="Arithmetic of the solver (the network's is its own).",
)
@click.option("--batch", type=click.IntRange(min=1), default=32, help="Images at a time.")
@click.option("--device", help="Such as cpu, cuda, cuda:1.  [default: cuda if there is one, else cpu]")
@click.option("--subdirs", is_flag=True, help="A folder per 1000 seeds.")
@click.option("--overwrite", is_flag=True, help="Replace images that exist already.")
@click.pass_context
def main(
    ctx: click.Context, device: str | None, seeds: str, dtype: str, preset: str | None, weights: Path, **options: Any
) -> None:
    """Draw images from a trained network.

    Writes {seed:06d}.png for every seed. The same seed gives the same image, whatever the batch; CPU and GPU differ.

    \b
    Eight images of class 3:
      python -m python_train.generate --net RUN/phema-0000131-0.100.safetensors --outdir out --seeds 0-7 --class 3
    With guidance by an earlier snapshot:
      python -m python_train.generate --net NET --gnet EARLIER --guidance 1.5 --outdir out --seeds 0-63
    With published weights, which lie in the folder weights/:
      python -m python_train.generate --preset edm2-img512-s-guid-dino --outdir out --seeds 0-63

    Under torchrun the seeds are divided among the processes.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if preset is not None:
            decided = {"net_path": "--net", "gnet_path": "--gnet", "guidance": "--guidance"}
            given = [o for name, o in decided.items() if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
            if given:
                raise UserError(f"--preset decides on the networks and the guidance: leave {' and '.join(given)} out")
            options |= dict(zip(decided, find_preset(preset, weights), strict=True))
        if options["net_path"] is None:
            raise UserError("name a network: --net or --preset")
        paths = generate(
            seeds=parse_seeds(seeds),
            device=open_device(device),
            dtype=getattr(torch, dtype),
            rank=rank,
            world_size=world_size,
            **options,
        )
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if paths:
        click.echo(f"{len(paths)} images in {options['outdir']}")


if __name__ == "__main__":
    main()
