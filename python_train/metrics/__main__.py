"""Command line of the metrics: ``python -m python_train.metrics ref | calc | gen``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from edm2ext.phema import parse_sigma_rel_list
from python_train import UserError
from python_train.checkpoint import write_text
from python_train.command_line import decorated, device_options, reported
from python_train.download import local_file
from python_train.generate import parse_seeds
from python_train.image_job import GuideFile
from python_train.metrics.compare import Estimate, check_numbers, measure
from python_train.metrics.extractors import KINDS, NEED_WEIGHTS, FeatureExtractor, feature_extractor
from python_train.metrics.images import (
    Drawing,
    Stored,
    StoredGuide,
    dataset_images,
    open_images,
    reconstruction_warnings,
)
from python_train.metrics.manifold import MOST_NEIGHBOURS
from python_train.metrics.passes import feature_pass, random_subset
from python_train.metrics.reference import Reference, describe, read_reference, write_reference
from python_train.sampling_options import (
    chosen_networks,
    guidance_options,
    network_options,
    sampler_options,
    vae_option,
)
from python_train.world import World, open_world

PUBLISHED_NUM = 50_000  # images that published values of FID and FD-DINOv2 are of
_SETTINGS: dict[str, Any] = {"max_content_width": 120, "show_default": True}
_PATH = click.Path(path_type=Path)
_FEATURES = "\n".join(f"  {name:<9} {kind.frechet}, {kind.kid}: {kind.about}" for name, kind in KINDS.items())
_SHARED = f"""\b
Features:
{_FEATURES}

Only FID and FD-DINOv2 may be compared with published values, and only of 50,000 images. Fréchet distances of fewer
images come out higher: compare them at equal numbers. KID does not depend on the number.

Under torchrun the processes share the work; the result does not depend on how many there are.
"""


def _weights_options(command: Any) -> Any:
    options = [
        click.option(f"--{name}", help=f"Weights of the features {name}, a file or URL: {needed}.")
        for name, needed in NEED_WEIGHTS.items()
    ]
    return decorated(command, options)


def _result_options(command: Any) -> Any:
    options = [
        click.option("--ref", "ref_path", type=_PATH, required=True, help="Reference file: made by `ref`, a .pkl of "
                     "the EDM2 reference program (read as data), or an .npz with mu and sigma of FID."),
        click.option("--features", multiple=True, type=click.Choice(list(KINDS)), help="Kinds of features to compare "
                     "by.  [default: those of the reference file whose weights are at hand]"),
        click.option("--bootstrap", "replicates", type=click.IntRange(min=0), default=20, help="Resamples of the "
                     "images that intervals are made of; 0 = no intervals."),
        click.option("--kid-subset", type=click.IntRange(min=2), help="Average KID over 100 random subsets of so "
                     "many images, as published values are, instead of comparing all pairs; the interval is theirs."),
        click.option("--out", type=_PATH, help="Write the results to this JSON file as well."),
        click.option("--overwrite", is_flag=True, help="Replace --out if it is there."),
    ]  # fmt: skip
    return decorated(command, options)


def _check_output(path: Path | None, overwrite: bool) -> None:
    if path is None:
        return
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; name another file, or --overwrite")
    if not path.parent.is_dir():
        raise UserError(f"the folder of {path} does not exist")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _extractors(names: Sequence[str], weights: dict[str, str | None], world: World) -> list[FeatureExtractor]:
    """The extractors; one process fetches what must be fetched."""
    sources = [source for name in names if (source := weights.get(name)) is not None]
    if world.rank == 0:
        for source in sources:
            local_file(source)
    world.wait()
    return [feature_extractor(name, weights.get(name), world.device) for name in names]


def named_estimates(name: str, estimates: dict[str, Estimate]) -> dict[str, Estimate]:
    """The metrics of one kind of features under the names that reports use, such as KID-EffLite0."""
    kind = KINDS[name]
    suffix = kind.kid.removeprefix("KID")
    renamed = {"fd": kind.frechet, "kid": kind.kid}
    return {renamed.get(key, f"{key}{suffix}"): estimate for key, estimate in estimates.items()}


def _table(estimates: dict[str, Estimate]) -> Iterator[str]:
    width = max(map(len, estimates))
    for name, estimate in estimates.items():
        interval = estimate.interval
        spread = f"   95 %: {interval[0]:.6g} to {interval[1]:.6g}" if interval else ""
        yield f"{name:<{width}}  {estimate.value:.6g}{spread}"


def _as_json(estimates: dict[str, Estimate]) -> dict[str, Any]:
    return {name: {"value": e.value, "std": e.std, "interval": e.interval} for name, e in estimates.items()}


def _compare(
    indices: Any,
    produce: Any,
    reference: Reference,
    extractors: Sequence[FeatureExtractor],
    replicates: int,
    kid_subset: int | None,
    batch: int,
    world: World,
) -> dict[str, Estimate]:
    """All metrics of the images; process 0 computes them, the others return nothing."""
    compared = [reference.features[extractor.name] for extractor in extractors]
    for features in compared:
        check_numbers(len(indices), features, kid_subset)
    if kid_subset is not None and all(features.features is None for features in compared):
        raise UserError("--kid-subset: the reference holds mean and covariance only, of which there is no KID")
    found = feature_pass(indices, produce, extractors, batch=batch, world=world, show_progress=world.rank == 0)
    estimates: dict[str, Estimate] = {}
    for extractor in extractors if world.rank == 0 else ():
        generated = found[extractor.name].features
        assert generated is not None
        result = measure(
            generated, reference.features[extractor.name], replicates, device=world.device, kid_subset=kid_subset
        )
        estimates.update(named_estimates(extractor.name, result))
    return estimates


def _open_reference(
    path: Path, features: Sequence[str], weights: dict[str, str | None], world: World
) -> tuple[Reference, list[FeatureExtractor]]:
    reference = read_reference(path)
    names = list(dict.fromkeys(features))
    if not names:
        at_hand = [name for name in reference.features if name not in NEED_WEIGHTS or weights[name]]
        names = at_hand or list(reference.features)
    for name in names:
        reference.require(path, name)
    extractors = _extractors(names, weights, world)
    for extractor in extractors:
        reference.check(path, extractor)
    return reference, extractors


def _remark(estimates: dict[str, Estimate], num: int) -> None:
    published = [name for name in ("FID", "FD-DINOv2") if name in estimates]
    if published and num != PUBLISHED_NUM:
        click.echo(f"{' and '.join(published)} of {num} images: published values are of {PUBLISHED_NUM}", err=True)


@click.group(context_settings=_SETTINGS)
def main() -> None:
    """How good generated images are: FID and its kin, KID, precision and recall, density and coverage.

    \b
    Make a reference of the real images once, then compare images, or a network that draws them, with it:
      python -m python_train.metrics ref photos64.zip photos64.ref
      python -m python_train.metrics calc out/ --ref photos64.ref
      python -m python_train.metrics gen --net NET --seeds 0-9999 --ref photos64.ref

    All metrics come from one pass over the images. Fréchet distance (FD; FID with the Inception network of 2015):
    between Gaussians fitted to the features. KID: a kernel distance without bias. Precision: fraction of the images
    that look like real ones; recall: fraction of the real ones that are like generated ones; density and coverage: the
    same, less sensitive to outliers.
    """


@main.command("ref", context_settings=_SETTINGS, epilog=_SHARED)
@click.argument("data")
@click.argument("dest", type=_PATH)
@click.option("--features", multiple=True, type=click.Choice(list(KINDS)), help="Kinds of features, several in one "
              "pass.  [default: those of --inception and --dinov2, else efflite0]")  # fmt: skip
@_weights_options
@click.option("--keep", type=click.IntRange(min=0), default=PUBLISHED_NUM, help="Keep the features of so many images, "
              "for all metrics but the Fréchet distance; 0 = for that alone.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=0), default=2, help="Processes that read ahead, in each process.")
@device_options(64)
@click.option("--overwrite", is_flag=True, help="Replace DEST if it is there.")
def _ref(
    data: str,
    dest: Path,
    features: tuple[str, ...],
    keep: int,
    workers: int,
    batch: int,
    device: str | None,
    overwrite: bool,
    **weights: str | None,
) -> None:
    """Make the reference file DEST of the images DATA, a folder or ZIP, or 'digits'.

    Images count as they are stored. For a network on latents, DATA are the images that were encoded.

    \b
    The reference of both published metrics, on eight GPUs:
      torchrun --standalone --nproc_per_node=8 -m python_train.metrics ref imagenet512.zip imagenet512.ref \\
          --inception inception-v3-2015-12-05.pkl --dinov2 dinov2_vitl14_pretrain.pth
    """
    with reported(), open_world(device) as world:
        _check_output(dest, overwrite)
        dataset = open_images(data)
        kept = min(keep, dataset.num_images)
        if 0 < kept <= MOST_NEIGHBOURS:
            raise UserError(f"the features of {kept} images are too few for any metric: keep {MOST_NEIGHBOURS + 1} or "
                            "more, or by --keep 0 none, which leaves the Fréchet distance")  # fmt: skip
        names = list(dict.fromkeys(features)) or [name for name in weights if weights[name]] or ["efflite0"]
        extractors = _extractors(names, weights, world)
        indices = random_subset(dataset.num_images, dataset.num_images)
        found = feature_pass(
            indices,
            lambda batches: dataset_images(dataset, batches, workers),
            extractors,
            batch=batch,
            keep=random_subset(dataset.num_images, keep),
            world=world,
            show_progress=world.rank == 0,
        )
        identities = {extractor.name: extractor.identity for extractor in extractors}
        reference = Reference(found, identities, dataset.shape, dataset.name)
        if world.rank == 0:
            write_reference(dest, reference)
            click.echo(f"{dest}: {data}")
            for line in describe(reference):
                click.echo(line)


@main.command("calc", context_settings=_SETTINGS, epilog=_SHARED)
@click.argument("images")
@_result_options
@_weights_options
@click.option("--num", type=click.IntRange(min=2), help="Take so many of the images, at random; fewer are an error.  "
              "[default: all]")  # fmt: skip
@click.option("--seed", type=int, default=0, help="Of the choice by --num.")
@click.option("--workers", type=click.IntRange(min=0), default=2, help="Processes that read ahead, in each process.")
@device_options(64)
def _calc(
    images: str,
    ref_path: Path,
    features: tuple[str, ...],
    replicates: int,
    kid_subset: int | None,
    out: Path | None,
    overwrite: bool,
    num: int | None,
    seed: int,
    workers: int,
    batch: int,
    device: str | None,
    **weights: str | None,
) -> None:
    """Compare IMAGES, a folder or ZIP, with a reference."""
    with reported(), open_world(device) as world:
        _check_output(out, overwrite)
        dataset = open_images(images)
        if num is not None and dataset.num_images < num:
            raise UserError(f"{images} holds {dataset.num_images} images, fewer than --num {num}")
        reference, extractors = _open_reference(ref_path, features, weights, world)
        reference.check_shape(ref_path, dataset.shape)
        indices = random_subset(dataset.num_images, num or dataset.num_images, seed)
        estimates = _compare(
            indices,
            lambda batches: dataset_images(dataset, batches, workers),
            reference,
            extractors,
            replicates,
            kid_subset,
            batch,
            world,
        )
        if world.rank == 0:
            click.echo(f"{len(indices)} images of {images} against {ref_path}")
            for line in _table(estimates):
                click.echo(line)
            _remark(estimates, len(indices))
            results = {"images": len(indices), "of": images, "reference": str(ref_path), "metrics": _as_json(estimates)}
            _write_results(out, results)


def _write_results(out: Path | None, results: Any) -> None:
    if out is not None:
        write_text(out, json.dumps(results, indent=2) + "\n")


@main.command("gen", context_settings=_SETTINGS, epilog=_SHARED)
@network_options(several="Or a run's folder, with --sigma-rel. Several are measured one after another.")
@click.option("--sigma-rel", help="EMA lengths to make of a run's snapshots: 0.05,0.10 or 0.02,0.04,...,0.20; each is "
              "measured.")  # fmt: skip
@click.option("--kimg", type=int, help="Training time of them, in thousands of images.  [default: the latest]")
@click.option("--seeds", default=f"0-{PUBLISHED_NUM - 1}", help="One image per seed: numbers and ranges.")
@click.option("--class", "class_idx", type=int, help="Draw this class only.  [default: a random class per seed]")
@guidance_options
@click.option("--gnet-sigma-rel", type=float, multiple=True, help="EMA length of each --gnet that is a run's folder.")
@click.option("--gnet-kimg", type=int, multiple=True, help="Training time of each --gnet that is a run's folder.")
@sampler_options
@vae_option
@_result_options
@_weights_options
@device_options(64)
def _gen(
    net_paths: tuple[Path, ...],
    preset: str | None,
    weights: str,
    sigma_rel: str | None,
    kimg: int | None,
    seeds: str,
    class_idx: int | None,
    gnet_paths: tuple[Path, ...],
    guidance: tuple[str, ...],
    guidance_blend: float | None,
    guidance_interval: tuple[str, ...],
    gnet_sigma_rel: tuple[float, ...],
    gnet_kimg: tuple[int, ...],
    vae: str,
    ref_path: Path,
    features: tuple[str, ...],
    replicates: int,
    kid_subset: int | None,
    out: Path | None,
    overwrite: bool,
    batch: int,
    device: str | None,
    inception: str | None,
    dinov2: str | None,
    **sampler: Any,
) -> None:
    """Draw images from a network and compare them with a reference; no image is written.

    The options of networks, guidance and sampler are those of python_train.generate, and so are the images.

    \b
    An EMA sweep of a run, each length against the same seeds:
      python -m python_train.metrics gen --net runs/photos --sigma-rel 0.02,0.04,...,0.20 --seeds 0-4999 \\
          --ref photos64.ref
    Autoguidance by an earlier time of a run, with another EMA length:
      python -m python_train.metrics gen --net runs/photos --sigma-rel 0.10 --gnet runs/photos --gnet-kimg 262 \\
          --gnet-sigma-rel 0.15 --guidance 2 --seeds 0-4999 --ref photos64.ref
    FID and FD-DINOv2 of a published setting, on eight GPUs:
      torchrun --standalone --nproc_per_node=8 -m python_train.metrics gen --preset edm2-img512-s-autog-fid \\
          --ref img512.pkl --inception inception-v3-2015-12-05.pkl --dinov2 dinov2_vitl14_pretrain.pth
    """
    with reported(), open_world(device) as world:
        _check_output(out, overwrite)
        paths, guide_files = chosen_networks(
            net_paths, preset, weights, gnet_paths, guidance, guidance_blend, guidance_interval, world
        )
        guides = _stored_guides(guide_files, gnet_sigma_rel, gnet_kimg)
        widths = [None] if sigma_rel is None else parse_sigma_rel_list(sigma_rel)
        numbers = parse_seeds(seeds)
        drawings = [
            Drawing(Stored(path, width, kimg), guides, numbers, class_idx, sampler, vae)
            for path in paths
            for width in widths
        ]
        sources = {"inception": inception, "dinov2": dinov2}
        reference, extractors = _open_reference(ref_path, features, sources, world)
        for drawing in drawings:
            if drawing.shape is not None:
                reference.check_shape(ref_path, drawing.shape)
        if world.rank == 0:
            networks = [drawing.network for drawing in drawings] + [guide.network for guide in guides]
            for text in reconstruction_warnings(networks):
                click.echo(f"WARNING: {text}", err=True)
        results: list[dict[str, Any]] = []
        for drawing in drawings:
            estimates = _compare(
                random_subset(len(numbers), len(numbers)),
                _producer(drawing, reference, ref_path, world.device),
                reference,
                extractors,
                replicates,
                kid_subset,
                batch,
                world,
            )
            if world.rank > 0:
                continue
            facts = drawing.facts()
            click.echo(f"{len(numbers)} images of {_in_words(facts)} against {ref_path}")
            for line in _table(estimates):
                click.echo(line)
            _remark(estimates, len(numbers))
            results.append({"images": len(numbers), "of": facts, "reference": str(ref_path),
                            "metrics": _as_json(estimates)})  # fmt: skip
            _write_results(out, results)


def _producer(
    drawing: Drawing, reference: Reference, ref_path: Path, device: torch.device
) -> Callable[..., Iterator[torch.Tensor]]:
    def produce(batches: Sequence[Any]) -> Iterator[torch.Tensor]:
        for images in drawing.images(batches, device):
            reference.check_shape(ref_path, tuple(images.shape[1:]))  # what a VAE makes is not known before
            yield images

    return produce


def _in_words(facts: dict[str, Any]) -> str:
    known = [f"{facts['nimg'] // 1000} kimg"] if facts["nimg"] is not None else []
    known += [f"sigma_rel {facts['sigma_rel']:g}"] if facts["sigma_rel"] is not None else []
    return facts["file"] + (f" ({', '.join(known)})" if known else "")


def _stored_guides(files: Sequence[GuideFile], sigma_rels: Sequence[float], kimgs: Sequence[int]) -> list[StoredGuide]:
    """The guides that make a difference; folders get their EMA lengths and times in order, one value is for all."""
    is_folder = [file.path.is_dir() for file in files]
    for option, values in (("--gnet-sigma-rel", sigma_rels), ("--gnet-kimg", kimgs)):
        if len(values) not in (0, 1, sum(is_folder)) or (values and not any(is_folder)):
            raise UserError(f"expected one {option}, or one for each --gnet that is a folder: got {len(values)}")
    guides, folders = [], 0
    for file, among_folders in zip(files, is_folder, strict=True):
        of_folder = [_one_of(values, folders) if among_folders else None for values in (sigma_rels, kimgs)]
        folders += among_folders
        guides.append(StoredGuide(Stored(file.path, *of_folder), file))
    return [guide for guide in guides if guide.file.is_active]


def _one_of(values: Sequence[Any], index: int) -> Any:
    return None if not values else values[0] if len(values) == 1 else values[index]


if __name__ == "__main__":
    main()
