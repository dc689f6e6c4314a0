"""Command ``python -m python_train.reconstruct plan``: how often and how a run should store its averages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click
import numpy as np

from edm2ext import phema
from edm2ext.phema import ROUNDING, STORAGES, Target
from edm2ext.phema.stored import BYTES
from python_train import UserError
from python_train.config import PRESETS, format_nimg, parse_nimg
from python_train.reconstruct.command import MOST_ERROR, MOST_PROFILE_ERROR

COUNTS = (16, 32, 64, 96, 128, 192, 256, 384, 512)  # of stored times
PROFILES = ((0.05,), (0.05, 0.10), (0.02, 0.10), (0.015, 0.05), (0.02, 0.05, 0.10), (0.01, 0.03, 0.10))
PUBLISHED = (0.05, 0.10)
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Way:
    """One way to store the averages of a run, and what is the worst of it over the widths that are wanted."""

    interval: int
    times: int
    profiles: tuple[float, ...]
    storage: str
    gigabytes: float
    profile_error: float
    noise: float

    @property
    def is_good(self) -> bool:
        """Whether every width comes out as asked for."""
        return self.profile_error <= MOST_PROFILE_ERROR and self.noise <= MOST_ERROR

    @property
    def badness(self) -> float:
        """How far it is from good."""
        return max(self.profile_error / MOST_PROFILE_ERROR, self.noise / MOST_ERROR)


def errors(interval: int, times: int, profiles: Sequence[float], widths: Sequence[float]) -> tuple[list, list]:
    """Profile error and norm of the coefficients of each width, at the end of a run that stores so many times."""
    nimg = np.repeat(interval * np.arange(1.0, times + 1), len(profiles))
    fits = phema.fit(nimg, np.tile(profiles, times), [Target(width) for width in widths])
    return [found.profile_error for found in fits], [found.norm for found in fits]


def ways(duration: int, parameters: int, widths: Sequence[float], unit: int, everything: bool = False) -> Iterator[Way]:
    """The ways whose interval divides the duration and is a multiple of ``unit`` images: all of them, or up to the size
    of the smallest good one."""
    counts = [times for times in COUNTS if duration % times == 0 and duration // times % unit == 0]
    smallest_good = float("inf")
    for times, profiles in sorted(itertools.product(counts, PROFILES), key=lambda way: (way[0] + 1) * len(way[1])):
        weights = (times + 1) * len(profiles) * parameters / 1e9
        if not everything and weights * min(BYTES.values()) > smallest_good:
            return
        found, norms = errors(duration // times, times, profiles, widths)
        for storage in STORAGES:
            size, noise = weights * BYTES[storage], max(norms) * ROUNDING[storage]
            way = Way(duration // times, times, profiles, storage, size, max(found), noise)
            if way.is_good:
                smallest_good = min(smallest_good, size)
            yield way


def best(candidates: Sequence[Way], disk: float | None) -> Way:
    """The smallest that is good and fits; else, of those that fit, the one that is nearest to good."""
    fitting = [way for way in candidates if disk is None or way.gigabytes <= disk]
    if not fitting:
        smallest = min(candidates, key=lambda way: way.gigabytes)
        raise UserError(f"{disk:g} GB are not enough: the smallest way takes {smallest.gigabytes:.1f} GB")
    good = [way for way in fitting if way.is_good]
    return min(good, key=lambda way: way.gigabytes) if good else min(fitting, key=lambda way: way.badness)


def parse_size(text: str) -> float:
    """Gigabytes of a size such as 200GB or 1.5TiB. UserError otherwise."""
    number = text.strip().upper()
    unit = next((name for name in sorted(UNITS, key=len, reverse=True) if number.endswith(name)), "")
    try:
        return float(number.removesuffix(unit)) * UNITS.get(unit, 1e9) / 1e9
    except ValueError:
        raise UserError(f"--disk: expected a size such as 200GB or 1.5TB, got {text!r}") from None


def parse_range(text: str) -> list[float]:
    """Nine widths from the one to the other, equally far apart by ratio. UserError for anything but LOW-HIGH."""
    low, _, high = text.partition("-")
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = 0.0, 0.0
    if not 0 < ends[0] < ends[1] < phema.MAX_SIGMA_REL:
        raise UserError(
            f"--range: expected two widths between 0 and {phema.MAX_SIGMA_REL:.4f} as 0.015-0.25, got {text!r}"
        )
    return np.geomspace(*ends, 9).round(4).tolist()


def parameters_of(preset: str) -> int:
    """Parameters of a preset's network for the data that its name says it is for."""
    import torch

    from python_train.config import make_options
    from python_train.loop import build_network

    shapes = {"img512": (64, 4, 1000), "img64": (64, 3, 1000), "digits": (8, 1, 10)}
    with torch.device("meta"):
        net = build_network(make_options(preset), *shapes[preset.partition("-")[0]])
    return sum(param.numel() for param in net.parameters())


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Take duration, batch and parameters from it.")
@click.option("--duration", help="Images of the run, such as 2Gi.")
@click.option("--parameters", type=float, help="Of the network, such as 125e6.")
@click.option("--batch", type=click.IntRange(min=1), help="Images of a step; intervals are multiples of it.")
@click.option(
    "--range", "sigma_range", default="0.015-0.25", help="Widths sigma_rel that shall be possible afterwards."
)
@click.option("--disk", help="Room for the snapshots, such as 200GB.  [default: no limit]")
@click.option("--all", "show_all", is_flag=True, help="Print every way, not only those no other is better than.")
def main(
    preset: str | None,
    duration: str | None,
    parameters: float | None,
    batch: int | None,
    sigma_range: str,
    disk: str | None,
    show_all: bool,
) -> None:
    """Plan the snapshots of a run, so that any EMA length in a range can be made of them afterwards.

    Compares intervals, tracked widths, and storage types: float16 as published, float32, and float16 with eight more
    bits in a file beside it (fp16+8). Errors are the worst over the range, at the end of the run: of the averaging
    profile, and of the weights by the rounding of what is stored, which short lengths amplify.

    \b
      python -m python_train.reconstruct plan --preset img512-xs --range 0.010-0.25 --disk 300GB
      python -m python_train.reconstruct plan --duration 64Mi --parameters 35e6 --batch 512
    """
    try:
        options = PRESETS.get(preset or "", {})
        images = parse_nimg(duration) if duration else options.get("duration")
        count = round(parameters) if parameters else parameters_of(preset) if preset else None
        step = batch or options.get("batch", 2048)
        if not images or not count:
            raise UserError("name a --preset, or --duration and --parameters")
        widths, room = parse_range(sigma_range), None if disk is None else parse_size(disk)
        candidates = list(ways(images, count, widths, int(np.lcm(step, 1024)), show_all))
        if not candidates:
            raise UserError(f"{format_nimg(images)} images cannot be divided into 16 or more intervals that are "
                            f"multiples of the batch {step} and of 1024")  # fmt: skip
        chosen = best(candidates, room)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    shown = candidates if show_all else _undominated(candidates)
    click.echo(
        f"{count / 1e6:,.1f} M parameters, {format_nimg(images)} images; sigma_rel {widths[0]:g} to {widths[-1]:g}"
    )
    click.echo(f"{'interval':>10}  {'tracked':<16}  {'storage':<7}  {'disk':>10}  profile error  rounding noise")
    for way in sorted({*shown, chosen}, key=lambda way: (way.gigabytes, way.badness)):
        click.echo(f"{_line(way)}{'  good' if way.is_good else ''}{'  <- chosen' if way == chosen else ''}")
    if not chosen.is_good:
        click.echo("WARNING: nothing that fits supports the whole range; this comes nearest", err=True)
    _print_before_and_after(chosen, images, count, step, widths)
    tracked = ",".join(f"{width:g}" for width in chosen.profiles)
    click.echo(f"train with: --snapshot {format_nimg(chosen.interval)} --snapshot-storage {chosen.storage} "
               f"--sigma-rels {tracked}")  # fmt: skip


def _line(way: Way) -> str:
    tracked = ",".join(f"{width:g}" for width in way.profiles)
    return (
        f"{format_nimg(way.interval):>10}  {tracked:<16}  {way.storage:<7}  {way.gigabytes:>7,.1f} GB  "
        f"{100 * way.profile_error:>11.2g} %  {100 * way.noise:>12.2g} %"
    )


def _undominated(candidates: Sequence[Way]) -> list[Way]:
    """Those than which no smaller one is nearer to good."""
    kept: list[Way] = []
    for way in sorted(candidates, key=lambda way: (way.gigabytes, way.badness)):
        if not kept or way.badness < kept[-1].badness:
            kept.append(way)
    return kept


def _print_before_and_after(way: Way, duration: int, parameters: int, batch: int, widths: Sequence[float]) -> None:
    """Errors of each width as the reference program would store the run, and in the way chosen."""
    interval = 8 * 2**20 if duration % (8 * 2**20) == 0 and duration >= 32 * 2**20 else way.interval
    before = errors(interval, duration // interval, PUBLISHED, widths)
    after = errors(way.interval, way.times, way.profiles, widths)
    size = (duration // interval + 1) * len(PUBLISHED) * parameters * BYTES["fp16"] / 1e9
    click.echo(f"\nas published (every {format_nimg(interval)}, 0.05 and 0.1 in fp16, {size:,.1f} GB), and as chosen:")
    click.echo("sigma_rel  profile error before and after  rounding noise before and after")
    for i, width in enumerate(widths):
        noise = before[1][i] * ROUNDING["fp16"], after[1][i] * ROUNDING[way.storage]
        click.echo(f"{width:>9.4f}  {100 * before[0][i]:>18.2g} %  {100 * after[0][i]:>6.2g} %  "
                   f"{100 * noise[0]:>19.2g} %  {100 * noise[1]:>6.2g} %")  # fmt: skip
