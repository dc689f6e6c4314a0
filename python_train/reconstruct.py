"""Command ``python -m python_train.reconstruct``: networks with any EMA length, from a run's snapshots (spec 5.4)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from edm2ext import ops
from edm2ext.phema import parse_sigma_rel_list, solve_coefficients
from python_train import UserError
from python_train.checkpoint import read_header, read_tensors, save_snapshot, snapshot_name
from python_train.network import Precond

_SNAPSHOT_NAME = re.compile(r"(.*)-(\d+)-(\d+\.\d+)\.(safetensors|pkl)")


@dataclass(frozen=True)
class Snapshot:
    """A stored average: where it lies and what its header says."""

    path: Path
    header: dict[str, Any]

    @property
    def nimg(self) -> int:
        """Images seen when it was taken."""
        return self.header["nimg"]

    @property
    def sigma_rel(self) -> float:
        """Relative width of its averaging profile."""
        return self.header["sigma_rel"]


@dataclass(frozen=True)
class Reconstruction:
    """A network with a new EMA length; its weights are the float16 values that a snapshot stores, held in float32."""

    net: Precond
    nimg: int
    sigma_rel: float
    dataset: dict[str, Any]
    encoder: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Store it as a snapshot of kind "phema", atomically."""
        save_snapshot(
            path,
            self.net,
            nimg=self.nimg,
            sigma_rel=self.sigma_rel,
            ema_kind="phema",
            dataset=self.dataset,
            encoder=self.encoder,
            extra=self.extra,
        )


def find_snapshots(indir: Path, prefix: str | None = None, sigma_rels: Sequence[float] | None = None) -> list[Snapshot]:
    """Snapshots of a folder by name, ordered by (nimg, sigma_rel); optionally only one prefix or some widths.

    Pickles of the EDM2 reference program count too, unless they lie there converted as well. Without a prefix, networks
    that were reconstructed themselves are left out. Raises UserError if the folder is
    missing, a file is unreadable, or nothing is left.
    """
    if not indir.is_dir():
        raise UserError(f"no such folder: {indir}")
    names = [(match, path) for path in sorted(indir.iterdir()) if (match := _SNAPSHOT_NAME.fullmatch(path.name))]
    paths = [path for match, path in names if prefix is None or match[1] == prefix]
    paths = [path for path in paths if path.suffix != ".pkl" or path.with_suffix(".safetensors") not in paths]
    snapshots = [Snapshot(path, read_header(path)) for path in paths]
    if prefix is None:
        snapshots = [snapshot for snapshot in snapshots if snapshot.header["ema_kind"] == "power"]
    if sigma_rels is not None:
        snapshots = [s for s in snapshots if any(abs(s.sigma_rel - wanted) < 5e-4 for wanted in sigma_rels)]
    if not snapshots:
        raise UserError(f"{indir} holds no {prefix or 'network-snapshot'}-*.safetensors or .pkl files that fit")
    return sorted(snapshots, key=lambda snapshot: (snapshot.nimg, snapshot.sigma_rel))


def _check_consistent(snapshots: Sequence[Snapshot]) -> None:
    first = snapshots[0]
    seen: dict[tuple[int, float], Path] = {}
    for snapshot in snapshots:
        for key in ("config", "dataset", "encoder"):
            if snapshot.header[key] != first.header[key]:
                raise UserError(f"{snapshot.path} and {first.path} are not of one run: their {key} differs")
        profile = (snapshot.nimg, snapshot.sigma_rel)
        if profile in seen:
            raise UserError(f"{snapshot.path} and {seen[profile]} hold the same average; name one run's files only")
        seen[profile] = snapshot.path


def target_time(snapshots: Sequence[Snapshot], out_nimg: int | None = None) -> int:
    """The time to reconstruct for: the latest input's, or out_nimg, which must be an input's. UserError otherwise."""
    times = sorted({snapshot.nimg for snapshot in snapshots if snapshot.nimg > 0})
    if not times:
        raise UserError("the only snapshots are those at 0 images, which hold nothing to average")
    if out_nimg is None:
        return times[-1]
    if out_nimg not in times:
        known = ", ".join(f"{time // 1000}" for time in times)
        raise UserError(f"no snapshot was taken at {out_nimg} images; there are some at (thousands): {known}")
    return out_nimg


def _read_tensors(path: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """All tensors of a snapshot; UserError if it is damaged or they are not those that its network has."""
    tensors = read_tensors(path)
    for name in shapes.keys() | tensors.keys():
        if name not in shapes or name not in tensors or tensors[name].shape != shapes[name]:
            raise UserError(f"{path}: the tensor {name} is missing, unknown or of a wrong shape")
    return tensors


def reconstruct(
    snapshots: Sequence[Snapshot],
    out_std: Sequence[float],
    out_nimg: int | None = None,
    *,
    batch: int = 8,
    show_progress: bool = False,
) -> Iterator[Reconstruction]:
    """Yield, for each width in out_std, the network averaged over training with that profile (spec 5.4).

    Args:
        snapshots: stored averages of one run; those at 0 images or after the target time are not used.
        out_std: widths sigma_rel wanted, each in (0, 0.2887).
        out_nimg: time to reconstruct for; must be one of the inputs'. None = the latest.
        batch: outputs held in memory together; every input is read once per batch.
        show_progress: draw a progress bar over the files read.

    Sums are in float32 of float16 weights; buffers are the last input's. Raises UserError for inputs that are missing,
    unreadable or not of one run, and for a time without snapshot; ValueError for widths out of range.
    """
    nimg = target_time(snapshots, out_nimg)
    used = sorted((s for s in snapshots if 0 < s.nimg <= nimg), key=lambda s: (s.nimg, s.sigma_rel))
    _check_consistent(used)
    header = used[0].header
    extra = {"license": header["license"]} if "license" in header else {}
    coefs = torch.from_numpy(
        solve_coefficients([s.nimg for s in used], [s.sigma_rel for s in used], nimg, list(out_std))
    )
    with torch.device("meta"):
        shape_net = Precond(**header["config"])
    shapes = {name: value.shape for name, value in shape_net.state_dict().items()}
    param_names = [name for name, _ in shape_net.named_parameters()]
    sizes = [shapes[name].numel() for name in param_names]

    batches = range(0, len(out_std), batch)
    with tqdm(total=len(batches) * len(used), unit="file", desc="reading", disable=not show_progress) as progress:
        for start in batches:
            widths = out_std[start : start + batch]
            totals = torch.zeros(len(widths), sum(sizes))
            tensors: dict[str, Tensor] = {}
            for snapshot, row in zip(used, coefs[:, start : start + batch], strict=True):
                tensors = _read_tensors(snapshot.path, shapes)
                weights = torch.cat([tensors[name].flatten() for name in param_names])
                ops.accumulate_snapshots([weights], row[None], out=totals)
                progress.update()
            for sigma_rel, total in zip(widths, totals, strict=True):
                state = {name: tensors[name].float() for name in shapes}
                for name, value in zip(param_names, total.half().float().split(sizes), strict=True):
                    state[name] = value.reshape(shapes[name])
                with torch.device("meta"):
                    net = Precond(**header["config"])
                net.load_state_dict(state, assign=True)
                net.eval().requires_grad_(False)
                yield Reconstruction(net, nimg, sigma_rel, header["dataset"], header["encoder"], extra)


def _parse_widths(text: str) -> list[float]:
    widths = parse_sigma_rel_list(text)
    if len({f"{width:.3f}" for width in widths}) < len(widths):
        raise UserError(f"file names hold three decimals of sigma_rel, which do not tell these apart: {text}")
    return widths


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--indir", type=click.Path(path_type=Path), required=True, help="Run directory with the snapshots.")
@click.option("--outdir", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
@click.option("--outstd", required=True, help='Widths sigma_rel wanted: 0.05,0.10 or "0.010,0.015,...,0.250".')
@click.option("--outkimg", type=int, help="Training time wanted, in thousands of images.  [default: the latest]")
@click.option("--prefix", default="phema", help="Start of the output file names.")
@click.option("--inprefix", help="Use only input files named so.  [default: any tracked average]")
@click.option("--instd", help="Use only inputs of these widths.  [default: all]")
@click.option("--batch", type=click.IntRange(min=1), default=8, help="Results held in memory together.")
@click.option("--skip-existing", is_flag=True, help="Leave results alone that are there already.")
@click.option("--overwrite", is_flag=True, help="Replace results that are there already.")
def main(
    indir: Path,
    outdir: Path,
    outstd: str,
    outkimg: int | None,
    prefix: str,
    inprefix: str | None,
    instd: str | None,
    batch: int,
    skip_existing: bool,
    overwrite: bool,
) -> None:
    """Choose the EMA length after training.

    Combines the averages that a run stored into networks averaged over any other length, as if it had been tracked
    during training. sigma_rel is the width of the averaging profile relative to the training time: 0.05 is short,
    0.20 long. Stored widths and those between and above them come out best.

    \b
    Ten lengths for the end of training:
      python -m python_train.reconstruct --indir RUN --outdir RUN/phema --outstd 0.02,0.04,...,0.20
    """
    try:
        widths = _parse_widths(outstd)
        snapshots = find_snapshots(indir, inprefix, _parse_widths(instd) if instd else None)
        at_kimg = [snapshot.nimg for snapshot in snapshots if snapshot.nimg // 1000 == outkimg]
        nimg = target_time(snapshots, None if outkimg is None else (at_kimg or [outkimg * 1000])[0])
        paths = {width: outdir / snapshot_name(nimg, width, prefix) for width in widths}
        existing = [path for path in paths.values() if path.exists()]
        if existing and not skip_existing and not overwrite:
            count = f"{len(existing)} of the results exist already"
            raise UserError(f"{count}, such as {existing[0]}; use --skip-existing or --overwrite")
        if skip_existing:
            widths = [width for width in widths if not paths[width].exists()]
        outdir.mkdir(parents=True, exist_ok=True)
        for result in reconstruct(snapshots, widths, nimg, batch=batch, show_progress=True):
            result.save(paths[result.sigma_rel])
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{len(widths)} networks written to {outdir}, {len(paths) - len(widths)} were there already")


if __name__ == "__main__":
    main()
