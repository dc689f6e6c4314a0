"""The options of the commands that draw images: networks, guidance and sampler."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import click
import torch

from python_train import UserError
from python_train.command_line import Decorator, decorated
from python_train.data.__main__ import DEFAULT_VAE
from python_train.guidance import Interval, blended_weights
from python_train.image_job import GuideFile
from python_train.presets import PUBLISHED_FILES, find_preset
from python_train.sample import SOLVERS
from python_train.world import World

_PATH = click.Path(path_type=Path)


def parse_weight(text: str) -> float | list[float]:
    """A guidance weight, or one for each step separated by commas. UserError otherwise."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"guidance: expected a number, or one for each step as 1,1.5,2, got {text!r}") from None
    return weights if len(weights) > 1 else weights[0]


def parse_interval(text: str) -> Interval:
    """Steps such as ``15-21``, or noise levels such as ``0.28,2.90``. UserError otherwise."""
    first, dash, last = text.partition("-")
    if dash and first.strip().isdecimal() and last.strip().isdecimal():
        return range(int(first), int(last) + 1)
    try:
        sigma_lo, sigma_hi = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"guidance interval: expected steps as 15-21 or two noise levels as 0.28,2.90, got {text!r}"
        ) from None
    return sigma_lo, sigma_hi


def pair_guides(
    paths: Sequence[Path], weights: Sequence[float | list[float]], blend: float | None, intervals: Sequence[Interval]
) -> list[GuideFile]:
    """The guides of the command line: each with its weight and interval, in order.

    One interval is for all guides. With ``blend`` two guides share one weight (`blended_weights`). UserError where the
    numbers of paths, weights and intervals do not fit.
    """
    if weights and not paths and any(weight != 1 for weight in weights):
        raise UserError("--guidance needs a guiding network: name its snapshot with --gnet")
    if intervals and not paths:
        raise UserError("--guidance-interval needs a guiding network: name its snapshot with --gnet")
    if blend is not None:
        if len(paths) != 2 or len(weights) != 1 or not isinstance(weights[0], float):
            raise UserError("--guidance-blend shares one --guidance number between two --gnet")
        weights = blended_weights(weights[0], blend)
    if paths and len(weights) != len(paths):
        raise UserError(f"each --gnet needs its own --guidance: got {len(paths)} and {len(weights)}")
    if len(intervals) not in (0, 1, len(paths)):
        raise UserError(f"expected one --guidance-interval, or one for each --gnet: got {len(intervals)}")
    intervals = [*intervals] * len(paths) if len(intervals) == 1 else intervals or [None] * len(paths)
    return [GuideFile(*guide) for guide in zip(paths, weights[: len(paths)], intervals, strict=True)]


def chosen_networks(
    net_paths: Sequence[Path],
    preset: str | None,
    weights: str,
    gnet_paths: Sequence[Path],
    guidance: Sequence[str],
    guidance_blend: float | None,
    guidance_interval: Sequence[str],
    world: World | None = None,
) -> tuple[tuple[Path, ...], list[GuideFile]]:
    """The networks and guides that `network_options` and `guidance_options` name, downloaded where they are URLs.

    Raises UserError where they do not fit or are not there. All processes of ``world`` call it.
    """
    if preset is not None:
        decided = {"--net": net_paths, "--gnet": gnet_paths, "--guidance": guidance}
        if given := [name for name, value in decided.items() if value]:
            raise UserError(f"--preset decides on the networks and the guidance: leave {' and '.join(given)} out")
        if world is not None and world.rank == 0:
            find_preset(preset, weights)  # what must be fetched, one process fetches
        if world is not None:
            world.wait()
        found = find_preset(preset, weights)
        net_paths = (found.net,)
        gnet_paths, guidance = ((found.gnet,), (str(found.guidance),)) if found.gnet else ((), ())
        if found.interval is not None and not guidance_interval:
            guidance_interval = (found.interval,)
    if not net_paths:
        raise UserError("name a network: --net or --preset")
    guide_weights = [parse_weight(text) for text in guidance]
    intervals = [parse_interval(text) for text in guidance_interval]
    return tuple(net_paths), pair_guides(gnet_paths, guide_weights, guidance_blend, intervals)


def network_options(several: str) -> Decorator:
    """--net, --preset and --weights; ``several`` says what several networks mean."""
    options = [
        click.option(
            "--net",
            "net_paths",
            type=_PATH,
            multiple=True,
            help="Snapshot of the network: .safetensors, or a .pkl of the EDM2 reference program, read as data. "
            + several,
        ),
        click.option(
            "--preset",
            help="Published networks and guidance by name, such as edm2-img512-s-guid-dino, in place of "
            "--net, --gnet and --guidance; any other word lists the names.",
        ),
        click.option(
            "--weights",
            default="weights",
            help="Folder of the networks that presets name, or a URL, from which they are downloaded once, such as "
            f"{PUBLISHED_FILES}",
        ),
    ]
    return lambda command: decorated(command, options)


def vae_option(command: Any) -> Any:
    """--vae."""
    text = "VAE of diffusers that decodes latents: its name on the hub, or a folder."
    return click.option("--vae", default=DEFAULT_VAE, help=text)(command)


def guidance_options(command: Any) -> Any:
    """--gnet and how it guides."""
    options = [
        click.option(
            "--gnet",
            "gnet_paths",
            type=_PATH,
            multiple=True,
            help="Snapshot of a guiding network: a smaller or "
            "less trained one, or an unconditional one. Several add up.",
        ),
        click.option(
            "--guidance",
            multiple=True,
            help="Weight of each --gnet, in order; 1 = none, above 1 pushes away from "
            "what the guide would draw. A list W,W,... gives one for each step.",
        ),
        click.option(
            "--guidance-blend",
            type=float,
            help="Share one --guidance between two --gnet: this fraction for the second, the rest for the first.",
        ),
        click.option(
            "--guidance-interval",
            multiple=True,
            help="Guide only in these steps, counted from 0, such as 15-21, or "
            "from above the one noise level to the other, such as 0.28,2.90, each taken for the nearest of the grid. "
            "One for all, or one for each --gnet. Elsewhere guides are not evaluated.",
        ),
    ]
    return decorated(command, options)


def _dtype(context: click.Context, parameter: click.Parameter, value: str) -> torch.dtype:
    return getattr(torch, value)


def sampler_options(command: Any) -> Any:
    """The settings of `python_train.sample.sample`, under its names."""
    options = [
        click.option(
            "--solver",
            type=click.Choice(SOLVERS),
            default="heun",
            help="heun evaluates the network 2N-1 times, the others N times; dpm++2m-sde adds noise.",
        ),
        click.option("--steps", "num_steps", type=click.IntRange(min=2), default=32, help="Sampling steps N."),
        click.option("--sigma-min", type=float, default=0.002, help="Lowest noise level."),
        click.option("--sigma-max", type=float, default=80, help="Highest noise level."),
        click.option("--rho", type=float, default=7, help="Spacing of the noise levels; larger = more of them low."),
        click.option(
            "--S-churn", "S_churn", type=float, default=0, help="Noise added back by heun and euler; 0 = none."
        ),
        click.option("--S-min", "S_min", type=float, default=0, help="Lowest noise level with churn."),
        click.option("--S-max", "S_max", type=float, default=inf, help="Highest noise level with churn."),
        click.option("--S-noise", "S_noise", type=float, default=1, help="Inflation of the churn noise."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "float64"]),
            default="float32",
            callback=_dtype,
            help="Arithmetic of the solver (the network's is its own).",
        ),
    ]
    return decorated(command, options)
