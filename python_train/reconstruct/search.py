"""Command ``python -m python_train.reconstruct search``: the EMA length, and guidance, that are best by a metric."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.figure import Figure

from edm2ext.phema import parse_sigma_rel_list
from python_train import UserError
from python_train.checkpoint import write_text
from python_train.command_line import device_options, reported
from python_train.generate import parse_seeds
from python_train.image_job import GuideFile
from python_train.metrics import measure
from python_train.metrics.compare import ReferenceFeatures, check_numbers
from python_train.metrics.extractors import KINDS, NEED_WEIGHTS, FeatureExtractor, feature_extractor
from python_train.metrics.images import Drawing, Stored, StoredGuide, reconstruction_warnings
from python_train.metrics.passes import feature_pass, random_subset
from python_train.metrics.reference import read_reference
from python_train.pictures import BLUE, GREY, ORANGE, save_figure
from python_train.sampling_options import parse_interval, sampler_options, vae_option
from python_train.world import World, open_world

Point = dict[str, Any]  # a value for each axis
Evaluate = Callable[[Point], float]
ANY_WIDTH = 0.1  # where a time is asked for and the width makes no difference
HIGHER_IS_BETTER = ("precision", "recall", "density", "coverage")


class Table:
    """What has been measured, a JSON object a line: a search that is interrupted goes on from it.

    ``settings`` is everything else that the values depend on. Raises UserError if the file is of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.values: dict[str, float] = {}
        self.digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = text.splitlines()
        if text and not text.endswith("\n"):
            _write_lines(path, lines)
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                other, key, value = entry["settings"], _key(entry["point"]), float(entry["value"])
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):  # half a line, of a process that was killed
                    _write_lines(path, lines[:-1])
                    break
                raise UserError(f"{path}: line {number} is not a measurement; name another --outdir") from error
            if other != self.digest:
                raise UserError(f"{path} holds a search with other settings; name another --outdir")
            self.values[key] = value

    def look_up(self, point: Point, evaluate: Evaluate) -> float:
        """The value at a point, measured if it is not known yet."""
        key = _key(point)
        if key not in self.values:
            value = float(evaluate(point))
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"point": canonical(point), "value": value, "settings": self.digest}) + "\n")
            self.values[key] = value
        return self.values[key]

    def points(self) -> list[tuple[Point, float]]:
        """All that is known."""
        return [(json.loads(key), value) for key, value in self.values.items()]


def canonical(point: Point) -> Point:
    """The point without what makes no difference at it: without guidance, how the guide would guide."""
    if point.get("guidance") != 1:
        return point
    return {name: None if name in ("guide_sigma_rel", "interval") else value for name, value in point.items()}


def _key(point: Point) -> str:
    return json.dumps(canonical(point), sort_keys=True)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_text(path, "".join(line + "\n" for line in lines))


@dataclass(frozen=True)
class Found:
    """The best point, its value, and how many were measured."""

    point: Point
    value: float
    measured: int


def minimise(
    axes: Mapping[str, Sequence[Any]],
    evaluate: Evaluate,
    table: Table,
    start: Point | None = None,
    *,
    refine: Sequence[str] = (),
    rounds: int = 3,
) -> Found:
    """The point with the least value, one axis after the other: each is swept with the others held at their best, until
    no sweep finds a better point or so many rounds are over.

    axes: the values to try, by name. evaluate: the metric at a point; smaller is better. table: measurements, kept and
    reused. start: where to begin; by default the middle of every axis. refine: axes of positive numbers on which points
    between the values are tried at the end, at the minimum of a parabola through the best three (by ratio).

    A full sweep of an axis, rather than a bracketing search, is not misled by the metric's noise, and draws the curve.
    """
    point = dict(start or {name: values[len(values) // 2] for name, values in axes.items()})
    value = table.look_up(point, evaluate)

    def try_all(name: str, candidates: Sequence[Any]) -> None:
        nonlocal point, value
        for candidate in candidates:
            other = {**point, name: candidate}
            found = table.look_up(other, evaluate)
            if found < value:
                point, value = other, found

    for _ in range(rounds):
        before = value
        for name, values in axes.items():
            try_all(name, values)
        if value == before or len([values for values in axes.values() if len(values) > 1]) == 1:
            break
    for name in refine:
        try_all(name, axes[name])  # measured already, unless another axis moved after it: the whole curve is wanted
        rest = {**canonical(point), name: None}
        curve = sorted((p[name], v) for p, v in table.points() if {**p, name: None} == rest)
        between = parabola_minimum(curve)
        if between is not None:
            try_all(name, [between])
    return Found(point, value, len(table.values))


def parabola_minimum(curve: Sequence[tuple[float, float]]) -> float | None:
    """Where a parabola in log x through the least of some points and its neighbours is least; None at an end of the
    curve, or where that is a point of it already."""
    best = min(range(len(curve)), key=lambda i: curve[i][1])
    if not 0 < best < len(curve) - 1:
        return None
    x, y = np.log([p[0] for p in curve[best - 1 : best + 2]]), [p[1] for p in curve[best - 1 : best + 2]]
    a, b, _ = np.polyfit(x, y, 2)
    if a <= 0:
        return None
    found = round(float(np.exp(-b / (2 * a))), 4)
    return found if min(abs(found - p[0]) for p in curve) >= 5e-4 else None


def plot(path: Path, table: Table, best: Point, metric: str, higher_is_better: bool) -> None:
    """Draw the metric against sigma_rel as PNG: bold where the rest is as at the best point, else thin."""
    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    ax = figure.add_subplot()
    sign = -1 if higher_is_better else 1
    curves: dict[str, list[tuple[float, float]]] = {}
    for point, value in table.points():
        rest = _key({**point, "sigma_rel": None})
        curves.setdefault(rest, []).append((point["sigma_rel"], sign * value))
    own = _key({**best, "sigma_rel": None})
    others = [sorted(curve) for rest, curve in curves.items() if rest != own and len(curve) > 1]
    for number, curve in enumerate(others):
        label = {"label": "otherwise"} if number == 0 else {}
        ax.plot(*zip(*curve, strict=True), color=GREY, linewidth=0.8, alpha=0.6, **label)
    best_label = {"label": "guidance as at the best"} if others else {}
    ax.plot(*zip(*sorted(curves[own]), strict=True), "o-", color=BLUE, markersize=4, **best_label)
    at_best = dict(curves[own])[best["sigma_rel"]]
    ax.plot([best["sigma_rel"]], [at_best], "o", color=ORANGE, markersize=9, markerfacecolor="none")
    if others:
        ax.legend(fontsize=9)
    rest = {name: value for name, value in canonical(best).items() if name != "sigma_rel" and value is not None}
    with_rest = ", ".join(f"{name} {value}" for name, value in rest.items())
    ax.set_title(f"best: sigma_rel {best['sigma_rel']:g}, {metric} {at_best:.5g}\n{with_rest}".strip(), fontsize=10)
    ax.set(xlabel="EMA length sigma_rel", ylabel=metric)
    ax.grid(True, color="#e2e8f0")
    save_figure(path, figure)


@dataclass(frozen=True)
class MetricOfImages:
    """A metric of the images that a run's networks draw, by `python_train.metrics`: smaller is better."""

    run: Path
    gnet: Path | None
    seeds: Sequence[int]
    class_idx: int | None
    sampler: dict[str, Any]
    vae: str
    metric: str
    reference: ReferenceFeatures
    extractor: FeatureExtractor
    kimg: int | None
    gnet_kimg: int | None
    batch: int
    world: World

    def __post_init__(self) -> None:
        """Raise UserError for what `measure` would, before anything is drawn."""
        if self.reference.features is None and self.metric != "fd":
            raise UserError(f"the reference holds no features of single images, which {self.metric} needs")
        check_numbers(len(self.seeds), self.reference)

    def settings(self) -> dict[str, Any]:
        """All that its values depend on beside the point."""
        kept = ("run", "gnet", "seeds", "class_idx", "sampler", "vae", "metric")
        folders = [(self.run, self.kimg), (self.gnet, self.gnet_kimg)]
        return {
            **{name: getattr(self, name) for name in kept},
            "features": self.extractor.identity,
            "reference": hashlib.sha256(self.reference.gaussian.mu.numpy().tobytes()).hexdigest(),
            "nimg": [
                Stored(path, ANY_WIDTH if path.is_dir() else None, kimg).header()["nimg"]
                for path, kimg in folders
                if path is not None
            ],
        }

    def __call__(self, point: Point) -> float:
        """Draw the images of the seeds with these EMA lengths and guidance, and measure them."""
        drawing = self.drawing(point)
        found = feature_pass(
            random_subset(len(self.seeds), len(self.seeds)),
            lambda batches: drawing.images(batches, self.world.device),
            [self.extractor],
            batch=self.batch,
            world=self.world,
        )
        estimates = measure(found[self.extractor.name].features, self.reference, device=self.world.device)
        value = estimates[self.metric].value
        value = -value if self.metric in HIGHER_IS_BETTER else value
        # All processes must go on alike, whatever rounding made of theirs.
        return float(self.world.broadcast(torch.tensor([value], dtype=torch.float64, device=self.world.device), 0))

    def networks(self, axes: Mapping[str, Sequence[Any]]) -> list[Stored]:
        """All that may be made of the snapshots."""
        own = [Stored(self.run, width, self.kimg) for width in axes["sigma_rel"]]
        if self.gnet is None:
            return own
        return own + [Stored(self.gnet, width, self.gnet_kimg) for width in axes["guide_sigma_rel"]]

    def drawing(self, point: Point) -> Drawing:
        """The images at a point, not drawn yet."""
        guides = []
        if self.gnet is not None and point["guidance"] != 1:
            interval = None if point["interval"] is None else parse_interval(point["interval"])
            network = Stored(self.gnet, point["guide_sigma_rel"], self.gnet_kimg)
            guides = [StoredGuide(network, GuideFile(self.gnet, point["guidance"], interval))]
        network = Stored(self.run, point["sigma_rel"], self.kimg)
        return Drawing(network, guides, self.seeds, self.class_idx, self.sampler, self.vae)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: expected numbers separated by commas, got {text!r}") from None


_PATH = click.Path(path_type=Path)


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--indir", type=_PATH, required=True, help="Run directory with the snapshots.")
@click.option("--outdir", type=_PATH, required=True, help="Folder for table.jsonl, the measurements; best.json; and "
              "sigma_rel.png, the plot.")  # fmt: skip
@click.option("--outstd", default="0.02,0.04,...,0.20", help="Widths sigma_rel to try.")
@click.option("--kimg", type=int, help="Training time, in thousands of images.  [default: the latest]")
@click.option("--ref", "ref_path", type=_PATH, required=True, help="Reference of the metric, made by python -m "
              "python_train.metrics ref, or a published one.")  # fmt: skip
@click.option("--features", type=click.Choice(list(KINDS)), default="efflite0", help="What images are compared by.")
@click.option("--metric", type=click.Choice(["fd", "kid", *HIGHER_IS_BETTER]), default="kid", help="What is to be "
              "best: least fd or kid, or most of the others.")  # fmt: skip
@click.option("--weights", help=f"File or URL of the features' network, which {' and '.join(NEED_WEIGHTS)} need.")
@click.option("--seeds", default="0-4999", help="Images that each point is measured on: numbers and ranges.")
@click.option("--class", "class_idx", type=int, help="Draw this class only.  [default: a random class per seed]")
@click.option("--gnet", type=_PATH, help="A guiding network: a snapshot, or a run's folder.")
@click.option("--guidance", default="1,1.5,2,2.5", help="With --gnet: weights to try.")
@click.option("--gnet-kimg", type=int, help="With a folder as --gnet: its training time, in thousands of images.  "
              "[default: the latest]")  # fmt: skip
@click.option("--gnet-outstd", help="With a folder as --gnet: its widths to try.  [default: those of --outstd]")
@click.option("--guidance-interval", "intervals", multiple=True, help="With --gnet: intervals to try beside guidance "
              "in all steps, as 15-21 or 0.28,2.90. May be given several times.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Sweeps over all axes at most.")
@sampler_options
@vae_option
@device_options(64)
def main(
    indir: Path,
    outdir: Path,
    outstd: str,
    kimg: int | None,
    ref_path: Path,
    features: str,
    metric: str,
    weights: str | None,
    seeds: str,
    class_idx: int | None,
    gnet: Path | None,
    guidance: str,
    gnet_kimg: int | None,
    gnet_outstd: str | None,
    intervals: tuple[str, ...],
    rounds: int,
    vae: str,
    batch: int,
    device: str | None,
    **sampler: Any,
) -> None:
    """Find the EMA length that is best by a metric, alone or together with the guidance.

    Sweeps sigma_rel, and with --gnet then the guide's sigma_rel, the interval and the guidance weight, one after the
    other with the rest at its best, again and again until nothing gets better; at the end it tries a sigma_rel between
    the listed ones. All points are measured on the same seeds. table.jsonl keeps what is measured: the same command
    goes on after an interruption, and costs nothing once it is done. Works under torchrun.

    \b
      python -m python_train.metrics ref photos64.zip photos64.ref
      python -m python_train.reconstruct search --indir runs/photos --outdir search --ref photos64.ref
      python -m python_train.reconstruct search --indir runs/photos --outdir joint --ref photos64.ref \\
          --gnet runs/small --guidance 1,1.5,2,3 --guidance-interval 0.28,2.90
    """
    with reported("interrupted; the same command goes on"), open_world(device) as world:
        axes = search_axes(outstd, gnet, guidance, gnet_outstd, intervals)
        images = parse_seeds(seeds)
        reference = read_reference(ref_path)
        reference.require(ref_path, features)
        extractor = feature_extractor(features, weights, world.device)
        reference.check(ref_path, extractor)
        compared = reference.features[features]
        evaluate = MetricOfImages(
            indir, gnet, images, class_idx, sampler, vae, metric, compared, extractor, kimg, gnet_kimg, batch, world
        )
        for point in corners(axes):
            evaluate.drawing(point)  # raises for what does not fit, before anything is drawn
        if world.rank == 0:
            for text in reconstruction_warnings(evaluate.networks(axes)):
                click.echo(f"WARNING: {text}", err=True)
        outdir.mkdir(parents=True, exist_ok=True)
        table = Table(outdir / "table.jsonl", evaluate.settings())
        if world.rank > 0:
            table.path = Path("/dev/null")
        shown = metric_name(features, metric)
        sign = -1 if metric in HIGHER_IS_BETTER else 1

        def measured(point: Point) -> float:
            value = evaluate(point)
            if world.rank == 0:
                text = ", ".join(f"{name} {v}" for name, v in canonical(point).items() if v is not None)
                click.echo(f"{text}: {shown} {sign * value:.6g}")
            return value

        found = minimise(axes, measured, table, refine=["sigma_rel"], rounds=rounds)
        if world.rank == 0:
            _finish(outdir, table, found, shown, sign < 0)
            for name in at_the_end(axes, found.point):
                click.echo(
                    f"{name} {found.point[name]:g} is at the end of what was tried: what lies beyond may be better"
                )


def _finish(outdir: Path, table: Table, found: Found, metric: str, higher_is_better: bool) -> None:
    value = -found.value if higher_is_better else found.value
    plot(outdir / "sigma_rel.png", table, found.point, metric, higher_is_better)
    _write_lines(
        outdir / "best.json",
        [json.dumps({"point": canonical(found.point), "metric": metric, "value": value}, indent=2)],
    )
    text = ", ".join(f"{name} {v}" for name, v in canonical(found.point).items() if v is not None)
    click.echo(f"best of {found.measured}: {text}: {metric} {value:.6g}; see {outdir / 'sigma_rel.png'}")


def at_the_end(axes: Mapping[str, Sequence[Any]], best: Point) -> list[str]:
    """The axes of numbers of which the best point has the first or the last of several."""
    point = canonical(best)
    return [
        name
        for name in ("sigma_rel", "guide_sigma_rel", "guidance")
        if len(values := sorted(filter(None, axes.get(name, ())))) > 1
        and point[name] in (values[0], values[-1])
        and (name, point[name]) != ("guidance", 1)  # beyond lies what makes images worse
    ]


def metric_name(features: str, metric: str) -> str:
    """As reports call it, such as KID-EffLite0."""
    kind = KINDS[features]
    return {"fd": kind.frechet, "kid": kind.kid}.get(metric, f"{metric}{kind.kid.removeprefix('KID')}")


def search_axes(
    outstd: str, gnet: Path | None, guidance: str, gnet_outstd: str | None, intervals: Sequence[str]
) -> dict[str, list[Any]]:
    """The values to try, by axis. UserError or ValueError for what is none."""
    axes: dict[str, list[Any]] = {"sigma_rel": parse_sigma_rel_list(outstd)}
    if gnet is None:
        if gnet_outstd or intervals:
            raise UserError("--gnet-outstd and --guidance-interval need a guiding network: name it with --gnet")
        return axes
    for interval in intervals:
        parse_interval(interval)
    if gnet.is_dir():
        axes["guide_sigma_rel"] = parse_sigma_rel_list(gnet_outstd or outstd)
    elif gnet_outstd:
        raise UserError(f"--gnet-outstd is for a run's folder; {gnet} is one network")
    else:
        axes["guide_sigma_rel"] = [None]
    axes["interval"] = [None, *intervals]
    axes["guidance"] = _numbers("--guidance", guidance)  # last: none at all is judged beside a guide that fits
    return axes


def corners(axes: Mapping[str, Sequence[Any]]) -> list[Point]:
    """The points at the ends of all axes."""
    ends = [dict.fromkeys([values[0], values[-1]]) for values in axes.values()]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*ends)]
