"""The command itself: networks with any EMA lengths, from a run's snapshots to files."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from edm2ext import phema
from edm2ext.phema import FITS, Quality, Target, parse_sigma_rel_list
from edm2ext.phema.stream import DEFAULT_MEMORY
from python_train import UserError
from python_train.checkpoint import snapshot_name
from python_train.command_line import in_words
from python_train.config import format_nimg
from python_train.reconstruct.snapshots import Snapshot, find_snapshots, open_snapshots, target_time
from python_train.snapshot_storage import FORMAT_VERSION

# Above these a result is not what was asked for: the weights are off, or the profile differs visibly.
MOST_ERROR, MOST_PROFILE_ERROR = 0.005, 0.02
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def parse_widths(text: str) -> list[float]:
    """Widths as `parse_sigma_rel_list` reads them, each with a file name of its own. UserError or ValueError if not."""
    widths = parse_sigma_rel_list(text)
    if len({f"{width:.3f}" for width in widths}) < len(widths):
        raise UserError(f"file names hold three decimals of sigma_rel, which do not tell these apart: {text}")
    return widths


def parse_groups(texts: Sequence[str]) -> dict[str, float]:
    """Patterns of parameter names and the widths they get, of ``PATTERN=WIDTH``. UserError otherwise."""
    groups = {}
    for text in texts:
        pattern, equals, width = text.rpartition("=")
        try:
            groups[pattern] = float(width)
        except ValueError:
            equals = ""
        if not pattern or not equals:
            raise UserError(
                f"--group: expected a pattern of parameter names and a width as unet.enc.*=0.05, got {text!r}"
            )
    return groups


def parse_times(text: str | None, snapshots: Sequence[Snapshot]) -> list[int]:
    """Times in images of a list in thousands; the latest without one. UserError where no snapshot was taken."""
    if text is None:
        return [target_time(snapshots)]
    times = []
    for item in text.split(","):
        if not item.strip().isdecimal():
            raise UserError(f"--outkimg: expected thousands of images separated by commas, got {text!r}")
        kimg = int(item)
        exact = [snapshot.nimg for snapshot in snapshots if snapshot.nimg // 1000 == kimg]
        times.append(target_time(snapshots, exact[0] if exact else kimg * 1000))
    return sorted(set(times))


def out_header(first: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """What a result's file says: the run's facts, and what is averaged how."""
    kept = {key: first[key] for key in ("config", "dataset", "encoder", "license") if key in first}
    return {"format_version": FORMAT_VERSION, **kept, **header}


def describe(qualities: Sequence[Quality], label: str = "sigma_rel") -> list[str]:
    """A table of what to expect, a line for each target."""
    lines = [f"{label:>9}  profile error  sum of |x|  rounding noise  error of the weights"]
    for quality in qualities:
        expected = f"{100 * quality.expected_error:.2g} %" if isfinite(quality.expected_error) else "not estimated"
        lines.append(
            f"{quality.target.sigma_rel:>9.3f}  {100 * quality.profile_error:>11.2g} %  {quality.sum_abs:>10.2f}  "
            f"{100 * quality.rounding_noise:>12.2g} %  {expected:>20}"
        )
    return lines


def warnings(qualities: Sequence[Quality], kind: str = "weights") -> list[str]:
    """What the snapshots cannot support, and what would.

    What counts is the error of the weights to expect; of the profile's, if that is what the fit made small (`kind`), or
    where nothing tells of the weights.
    """
    found = []
    noisy = [q for q in qualities if q.rounding_noise > MOST_ERROR]
    by_profile = [q for q in qualities if kind == "profile" or not isfinite(q.expected_error)]
    off = [q for q in by_profile if q.profile_error > MOST_PROFILE_ERROR]
    rough = [q for q in qualities if q not in by_profile and q.expected_error**2 - q.rounding_noise**2 > MOST_ERROR**2]
    for few, error, of in ((off, _profile_error, "profile is"), (rough, _expected_error, "weights are")):
        if few:
            worst = max(few, key=error)
            found.append(
                f"the snapshots are too few for sigma_rel {_list(few)}: the {of} off by {100 * error(worst):.2g} % at "
                f"{worst.target.sigma_rel:g} (the profile's width comes out as {worst.sigma_rel:.3f}); snapshots at "
                "shorter intervals, or another tracked width, would support it "
                "(python -m python_train.reconstruct plan)"
            )
    if noisy:
        worst = max(noisy, key=_rounding_noise)
        found.append(
            f"the snapshots are stored too coarsely for sigma_rel {_list(noisy)}: rounding makes an error of "
            f"{100 * worst.rounding_noise:.2g} % in the weights at {worst.target.sigma_rel:g}; training with "
            "--snapshot-storage fp16+8 or fp32 avoids it"
        )
    return found


def warnings_of(snapshots: Sequence[Snapshot], widths: Sequence[float], nimg: int) -> list[str]:
    """`warnings` about networks of these widths at a time; UserError and ValueError as the reconstruction itself."""
    averages = open_snapshots([snapshot for snapshot in snapshots if 0 < snapshot.nimg <= nimg])
    work = phema.Reconstruction(averages, [Target(width, nimg) for width in widths])
    return warnings(work.quality(work.motion()))


_profile_error, _expected_error, _rounding_noise = map(
    attrgetter, ("profile_error", "expected_error", "rounding_noise")
)


def _list(qualities: Sequence[Quality]) -> str:
    widths = sorted({quality.target.sigma_rel for quality in qualities})
    if len(widths) <= 4:
        return ", ".join(f"{width:g}" for width in widths)
    return f"{widths[0]:g} to {widths[-1]:g} ({len(widths)} of them)"


def _describe_inputs(work: phema.Reconstruction) -> str:
    stored = [average.storage for average in work.inputs]
    kinds = " and ".join(f"{stored.count(kind)} in {kind}" for kind in dict.fromkeys(stored))
    widths = ", ".join(f"{width:g}" for width in sorted(set(work.std.tolist())))
    first, last = (format_nimg(int(time)) for time in (work.nimg[0], work.nimg[-1]))
    return f"{len(stored)} stored averages, {kinds}: sigma_rel {widths}, from {first} to {last} images"


_EPILOG = """\b
Examples:
  Ten lengths for the end of training:
    python -m python_train.reconstruct --indir RUN --outdir RUN/phema --outstd 0.02,0.04,...,0.20
  49 lengths at three times, in one pass over the snapshots:
    python -m python_train.reconstruct --indir RUN --outdir RUN/phema --outstd 0.010,0.015,...,0.250 \\
        --outkimg 8388,16777,33554
  What the snapshots can support, without writing anything:
    python -m python_train.reconstruct --indir RUN --outdir RUN/phema --outstd 0.010,0.015,...,0.250 --dry-run
  Another length for the decoder; the average of the last tenth of training:
    python -m python_train.reconstruct --indir RUN --outdir RUN/phema --outstd 0.10 --group 'unet.dec.*=0.15'
    python -m python_train.reconstruct --indir RUN --outdir RUN/phema --outstd 0.0289 --shape window

\b
Two more commands, with a --help of their own:
  python -m python_train.reconstruct plan      how often and how a run should store its averages
  python -m python_train.reconstruct search    the length (and guidance) that is best by some metric
"""
_PATH = click.Path(path_type=Path)


@click.command(epilog=_EPILOG, context_settings={"show_default": True, "max_content_width": 120})
@click.option("--indir", type=_PATH, required=True, help="Run directory with the snapshots.")
@click.option("--outdir", type=_PATH, required=True, help="Folder for the results.")
@click.option("--outstd", required=True, help='Widths sigma_rel wanted: 0.05,0.10 or "0.010,0.015,...,0.250".')
@click.option("--outkimg", help="Training times wanted, in thousands of images, as 8388 or 8388,16777: as if training "
              "had stopped there.  [default: the latest]")  # fmt: skip
@click.option("--shape", type=click.Choice(list(phema.SHAPES)), default="power", help="Of the averaging profile: "
              "power, the tracked one; exponential, the classic EMA; window, the mean of the last sqrt(12) sigma_rel "
              "of training. All have the standard deviation sigma_rel times the training time.")  # fmt: skip
@click.option("--group", "groups", multiple=True, metavar="PATTERN=WIDTH", help="Give parameters whose names match the "
              "pattern (as unet.enc.*) this width in all results. The first that matches counts.")  # fmt: skip
@click.option("--fit", "kind", type=click.Choice(FITS), default="weights", help="What to make as small as possible: "
              "the error of the weights to expect, or that of the profile, which gives the published coefficients "
              "(Eqs. 128 to 151).")  # fmt: skip
@click.option("--prefix", help="Start of the output file names.  [default: phema; with --shape or --group, "
              "phema-window and the like]")  # fmt: skip
@click.option("--inprefix", help="Use only input files named so.  [default: any tracked average]")
@click.option("--instd", help="Use only inputs of these widths.  [default: all]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp16", help="Of the results.")
@click.option("--device", default="cpu", help="Where sums are made: cpu, cuda or cuda:N.")
@click.option("--memory", type=click.IntRange(min=1), default=DEFAULT_MEMORY >> 20, help="MiB of all buffers together.")
@click.option("--threads", type=click.IntRange(min=1), default=8, help="That read, and as many that write.")
@click.option("--batch", type=click.IntRange(min=1), hidden=True, help="Of earlier versions; all are made in one pass.")
@click.option("--skip-existing", is_flag=True, help="Leave results alone that are there already.")
@click.option("--overwrite", is_flag=True, help="Replace results that are there already.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what to expect and stop; writes nothing.")
def main(
    indir: Path,
    outdir: Path,
    outstd: str,
    outkimg: str | None,
    shape: str,
    groups: tuple[str, ...],
    kind: str,
    prefix: str | None,
    inprefix: str | None,
    instd: str | None,
    dtype: str,
    device: str,
    memory: int,
    threads: int,
    batch: int | None,
    skip_existing: bool,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Choose the EMA length after training.

    Combines the averages that a run stored into networks averaged over any other length, as if it had been tracked
    during training. sigma_rel is the width of the averaging profile relative to the training time: 0.05 is short,
    0.20 long. Stored widths and those between and above them come out best.

    All results are made in one pass over the snapshots (safetensors, or pickles of the EDM2 reference program, read as
    data) and appear together when they are whole; after an interruption the same command continues. For each length
    it prints how far the profile is off, the sum of the coefficients' magnitudes, and the errors of the weights to
    expect: from the rounding of the stored weights alone, and together with that of the profile, given how the
    weights moved during training.
    """
    try:
        widths, patterns = parse_widths(outstd), parse_groups(groups)
        prefix = prefix or "-".join(["phema", *[shape] * (shape != "power"), *["groups"] * bool(patterns)])
        snapshots = find_snapshots(indir, inprefix, parse_widths(instd) if instd else None)
        times = parse_times(outkimg, snapshots)
        targets = {outdir / snapshot_name(t, width, prefix): Target(width, t, shape) for t in times for width in widths}
        existing = [path for path in targets if path.exists()]
        if existing and not (skip_existing or overwrite or dry_run):
            count = f"{len(existing)} of the results exist already"
            raise UserError(f"{count}, such as {existing[0]}; use --skip-existing or --overwrite")
        todo = {path: target for path, target in targets.items() if not (skip_existing and path in existing)}
        if not todo:
            click.echo(f"all {len(targets)} results are there already")
            return
        work = phema.Reconstruction(open_snapshots(snapshots), list(todo.values()), patterns, kind)
        _print_expectations(work, times, list(patterns))
        if dry_run:
            return
        headers = [out_header(work.inputs[0].header, work.header(target)) for target in todo.values()]
        numel = work.combination.numel
        with tqdm(total=numel, unit_scale=True, unit=" parameters", desc="averaging") as progress:
            work.to_files(
                list(todo), headers, dtype=DTYPES[dtype], device=device, memory=memory << 20, threads=threads,
                progress=lambda position: progress.update(position - progress.n),
            )  # fmt: skip
    except (ValueError, OSError, RuntimeError) as error:
        raise click.ClickException(in_words(error)) from error
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; the same command continues") from None
    click.echo(f"{len(todo)} networks written to {outdir}, {len(targets) - len(todo)} were there already")


def _print_expectations(work: phema.Reconstruction, times: Sequence[int], patterns: Sequence[str]) -> None:
    click.echo(_describe_inputs(work))
    qualities = work.quality(work.motion())
    for time in times:
        if len(times) > 1:
            click.echo(f"at {format_nimg(time)} images:")
        for line in describe([q for q in qualities[: len(work.targets)] if q.target.nimg == time]):
            click.echo(line)
    for pattern, quality in zip(patterns, qualities[len(work.targets) :], strict=True):
        click.echo(f"{pattern}:")
        for line in describe([quality])[1:]:
            click.echo(line)
    for text in warnings(qualities, work.kind):
        click.echo(f"WARNING: {text}", err=True)
