"""Command ``python -m python_train.convert``: weights of the EDM2 reference program to ours, and back (spec 9)."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import safetensors
import torch
from torch import Tensor
from tqdm import tqdm

from python_train import UserError
from python_train.checkpoint import read_header, read_tensors, save_state, snapshot_name, stream_snapshot
from python_train.command_line import reported
from python_train.network import Precond
from python_train.official import (
    EXPORTED_FACTS,
    LICENSE,
    OfficialSnapshot,
    OfficialTrainingState,
    read_official,
)
from python_train.pickles.names import FILE_NAME, nimg_of


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the user says of the weights: overrides what files do not tell, or tell otherwise. None = not said."""

    kimg: int | None = None
    sigma_rel: float | None = None
    kind: str | None = None
    license: str | None = None


NOTHING_SAID = Facts()
_OTHER_FILES = (".pt", ".pth", ".pkl", ".ckpt", ".bin")


def convert(source: Path, target: Path, facts: Facts = NOTHING_SAID, *, overwrite: bool = False) -> list[Path]:
    """Write the networks in one file of the reference as snapshots; returns the new files, each written whole.

    Args:
        source: a snapshot, a reconstructed network (both ``.pkl``), a training state, or what `export_state_dict` wrote
            (both ``.pt``); nothing in it is executed (:mod:`python_train.official`).
        target: ``NAME.safetensors``, or a folder: a snapshot keeps its name there, averages of a training state are
            named as in training.
        facts: of a training state, ``sigma_rel`` chooses one average; else see :class:`Facts`.
        overwrite: replace files that exist. Without, one that is whole and comes from this source is left as it is.

    Memory is that of the largest tensor. Raises UserError if the source is refused, does not tell all that a header
    needs, or the target exists and is something else; nothing is written then.
    """
    return _convert(source, target, facts, overwrite)[0]


def _convert(source: Path, target: Path, facts: Facts, overwrite: bool) -> tuple[list[Path], int]:
    """The new files, and how many were there already."""
    if source.suffix == ".safetensors":
        raise UserError(f"{source} is a snapshot of this program already; --to official converts it to a .pt file")
    if target.suffix in _OTHER_FILES and not target.is_dir():
        raise UserError(f"{target}: results are .safetensors files; name one, or a folder (--to official writes .pt)")
    networks = _networks(source, facts)
    if target.suffix == ".safetensors" and not target.is_dir():
        if len(networks) > 1:
            widths = ", ".join(f"{snapshot.header['sigma_rel']:g}" for _, snapshot in networks)
            raise UserError(
                f"{source} holds averages of the widths {widths}: choose one by --sigma-rel, or name a folder"
            )
        outputs = [(target, snapshot) for _, snapshot in networks]
    else:
        outputs = [(target / name, snapshot) for name, snapshot in networks]
    todo = [(path, snapshot) for path, snapshot in outputs if overwrite or not _is_done(path, snapshot)]
    for path, snapshot in todo:
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = {name: tensor.shape for name, tensor in snapshot.tensors.items()}
        stream_snapshot(path, snapshot.header, shapes, _values(snapshot, path.name))
    return [path for path, _ in todo], len(outputs) - len(todo)


def _networks(source: Path, facts: Facts) -> list[tuple[str, OfficialSnapshot]]:
    """The networks in a file with complete headers, and the names they get in a folder."""
    content = read_official(source)
    if isinstance(content, OfficialTrainingState):
        averages = content.averages
        if facts.sigma_rel is not None and None not in averages:
            averages = {std: average for std, average in averages.items() if abs(std - facts.sigma_rel) < 5e-4}
            if not averages:
                widths = ", ".join(f"{std:g}" for std in content.averages)
                raise UserError(f"{source} has no average of width {facts.sigma_rel:g}; it has {widths}")
        headers = [_complete(source, average.header, facts) for average in averages.values()]
        names = [snapshot_name(header["nimg"], header["sigma_rel"]) for header in headers]
        snapshots = [OfficialSnapshot(h, a.tensors) for h, a in zip(headers, averages.values(), strict=True)]
        return list(zip(names, snapshots, strict=True))
    header = _complete(source, content.header, facts)
    return [(f"{source.stem}.safetensors", OfficialSnapshot(header, content.tensors))]


def _complete(source: Path, header: dict[str, Any], facts: Facts) -> dict[str, Any]:
    given = {
        "nimg": None if facts.kimg is None else nimg_of(facts.kimg),
        "sigma_rel": facts.sigma_rel,
        "ema_kind": facts.kind,
        "license": facts.license,
    }
    header = {**header, **{key: value for key, value in given.items() if value is not None}}
    missing = [option for option, key in (("--kimg", "nimg"), ("--sigma-rel", "sigma_rel")) if header[key] is None]
    if missing:
        raise UserError(f"{source} does not tell what it is (by a name such as edm2-img512-xs-2147483-0.135.pkl): "
                        f"add {' and '.join(missing)}")  # fmt: skip
    return header


def _is_done(path: Path, snapshot: OfficialSnapshot) -> bool:
    """Whether the file is there, whole and of this source. UserError if it is there and is something else."""
    if not path.exists():
        return False
    try:
        with safetensors.safe_open(path, "pt"):
            pass
    except (safetensors.SafetensorError, OSError):
        raise UserError(f"{path} exists already and is damaged or something else; use --overwrite") from None
    if read_header(path).get("source") != snapshot.header["source"]:
        raise UserError(f"{path} exists already and was not made from this file; use --overwrite")
    return True


def _values(snapshot: OfficialSnapshot, label: str) -> Iterator[Tensor]:
    """The tensors one by one, with a progress bar over their bytes."""
    total = sum(tensor.nbytes for tensor in snapshot.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, leave=False) as progress:
        for tensor in snapshot.tensors.values():
            yield tensor.read()
            progress.update(tensor.nbytes)


def convert_folder(
    source: Path, target: Path, facts: Facts = NOTHING_SAID, *, overwrite: bool = False
) -> tuple[list[Path], int, list[str]]:
    """Convert every ``PREFIX-KIMG-SIGMA.pkl`` of a folder; returns (new files, how many were done before, refusals).

    A file that is refused does not stop the others. Raises UserError if the folder has no such file.
    """
    paths = [path for path in sorted(source.iterdir()) if FILE_NAME.fullmatch(path.name)]
    if not paths:
        raise UserError(f"{source} holds no snapshots named like edm2-img512-xs-0134217-0.050.pkl")
    if target.suffix == ".safetensors":
        raise UserError(f"{source} is a folder: the results need a folder too, not {target}")
    written: list[Path] = []
    done = 0
    refused: list[str] = []
    for path in tqdm(paths, unit="file", desc="converting"):
        try:
            new, old = _convert(path, target, facts, overwrite)
        except UserError as error:  # noqa: PERF203
            refused.append(str(error))
        else:
            written += new
            done += old
    return written, done, refused


def export_state_dict(source: Path, target: Path, *, overwrite: bool = False) -> None:
    """Write a snapshot of ours as a torch file of plain values, which the reference's network loads as its state dict.

    Its keys are those of a training state as far as they apply (spec 9.6): ``net``, the tensors by the reference's
    names in its order, ``state`` with ``cur_nimg``; ``init_kwargs``, the arguments of the reference's ``Precond``; and
    what else the header tells, so that `convert` makes the same snapshot of it again. The reference's own pickles carry
    its source code, which this program does not have. Raises UserError if the source is no snapshot, or the target
    exists or is not named like such a file.
    """
    if source.is_dir():
        raise UserError(f"{source} is a folder: --to official converts one snapshot")
    if target.is_dir() or target.suffix == ".safetensors":
        raise UserError(f"{target}: --to official writes a file of torch; name it such as {source.stem}.pt")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists already; use --overwrite")
    header = read_header(source)
    tensors = read_tensors(source)
    with torch.device("meta"):
        names = list(Precond(**header["config"]).state_dict())
    if set(names) != tensors.keys():
        raise UserError(f"{source}: the snapshot is damaged: its tensors are not those of its network")
    net = OrderedDict((name, tensors[name]) for name in names)
    facts = {key: header[key] for key in EXPORTED_FACTS if key in header}
    state = {"cur_nimg": header["nimg"], "total_elapsed_time": 0.0}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_state(target, {"state": state, "net": net, "init_kwargs": header["config"], **facts})


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["edm2ext", "official"]),
    default="edm2ext",
    help="Which program shall read the result.",
)
@click.option(
    "--sigma-rel",
    type=float,
    help="EMA width of the network where the file name does not tell; of a training state: convert this average only.",
)
@click.option(
    "--kimg", type=click.IntRange(min=0), help="Training time in thousands of images where the name does not tell."
)
@click.option(
    "--kind",
    type=click.Choice(["power", "phema"]),
    help="Tracked in training, or reconstructed afterwards.  [default: by name and width]",
)
@click.option(
    "--license",
    "license_text",
    help=f"Licence of the weights, where they are not the published ones.  [default: {LICENSE}]",
)
@click.option("--overwrite", is_flag=True, help="Replace results that are there already.")
def main(
    source: Path,
    target: Path,
    to: str,
    sigma_rel: float | None,
    kimg: int | None,
    kind: str | None,
    license_text: str | None,
    overwrite: bool,
) -> None:
    """Convert weights of the EDM2 reference program to a snapshot of this one, without executing anything.

    The reference publishes its networks as pickles, which hold source code and run it when they are loaded. This
    command reads them as data: names in the file are looked up in a short list and never imported, and a file that
    asks for anything else is refused with the reason. SOURCE is a snapshot or reconstructed network (.pkl), a training
    state (.pt), or a folder of snapshots; TARGET is a .safetensors file or a folder. What is converted already is left
    alone, so the same command continues after an interruption.

    \b
    A published network, then images of it:
      python -m python_train.convert edm2-img512-xs-2147483-0.135.pkl xs.safetensors
      python -m python_train.generate --net xs.safetensors --outdir out --seeds 0-7
    A folder of raw snapshots, for another EMA length:
      python -m python_train.convert raw-snapshots/ converted/
      python -m python_train.reconstruct --indir converted --outdir phema --outstd 0.07
    Both averages of a training state:
      python -m python_train.convert training-state-0134217.pt averages/

    The way back, --to official, writes a .pt file of plain values for a network that the reference has built, and which
    this command takes as SOURCE too:

    \b
      python -m python_train.convert mine.safetensors mine.pt --to official
      data = torch.load("mine.pt"); net = Precond(**data["init_kwargs"]); net.load_state_dict(data["net"])

    The published weights are licensed under CC BY-NC-SA 4.0 (no commercial use), which conversion does not change: the
    licence is written into the header of every result, and kept by what is made of it.
    """
    facts = Facts(kimg, sigma_rel, kind, license_text)
    with reported("interrupted; the same command goes on"):
        if sigma_rel is not None and not 0 < sigma_rel < 1:
            raise UserError(f"--sigma-rel must lie between 0 and 1, got {sigma_rel:g}")
        if to == "official":
            if any(value is not None for value in dataclasses.astuple(facts)):
                raise UserError(
                    "--to official takes everything from the snapshot's header: leave the other options out"
                )
            export_state_dict(source, target, overwrite=overwrite)
            click.echo(f"{target} written")
            return
        refused: list[str] = []
        if source.is_dir():
            written, done, refused = convert_folder(source, target, facts, overwrite=overwrite)
        else:
            written, done = _convert(source, target, facts, overwrite)
    click.echo(f"{len(written)} networks written to {target}, {done} were there already")
    for text in sorted({read_header(path).get("license") for path in written} - {None}):
        click.echo(f"licence of the weights: {text}{' (no commercial use)' if text == LICENSE else ''}")
    if refused:
        raise click.ClickException("\n".join([f"{len(refused)} files were not converted:", *refused]))


if __name__ == "__main__":
    main()
