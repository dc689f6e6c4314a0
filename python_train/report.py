"""One self-contained HTML page about a run: ``python -m python_train.report RUN`` (curves, pictures, settings)."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib
from matplotlib.figure import Figure

from python_train import UserError, checkpoint
from python_train.pictures import BLUE, GREY, ORANGE, read_stats

_STYLE = """
:root { color-scheme: light dark; --ink: #1a202c; --paper: #ffffff; --soft: #718096; --line: #e2e8f0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e2e8f0; --paper: #171923; --soft: #a0aec0; --line: #2d3748; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 74rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.soft { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
.plots > * { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; }
svg, img { max-width: 100%; height: auto; } img { border-radius: 6px; }
figure { margin: 0; } figcaption { color: #4a5568; font-size: .85rem; padding: .2rem .5rem; }
summary { cursor: pointer; } table { border-collapse: collapse; margin-top: .7rem; }
td, th { text-align: left; padding: .15rem 1.2rem .15rem 0;
        border-bottom: 1px solid var(--line); vertical-align: top; } td.number { text-align: right; }
.warning { color: #c05621; }
"""
_NOISE = re.compile(r"Noise/(.+)/error")
_SAMPLES = re.compile(r"samples-(\d+)-(.+)\.png")
_MAGNITUDE = re.compile(r"Magnitude/(.+)/(activations|weights)_(max|mean)")
_CLIPPED = re.compile(r"Magnitude/(.+)/clipped")
_METRIC = re.compile(r"Metric/(.+)/(.+)")
_NOT_FINITE = "Loss/nonfinite_gradients"
_SWEEP_PLOT, _LOSS_PLOT = "ema-sweep.png", "loss.png"  # of a demo


def write_page(run_dir: Path, path: Path) -> None:
    """Write the page about the run in ``run_dir`` to ``path``, whole or not at all.

    Raises UserError if the directory holds no run, and OSError if the page cannot be written.
    """
    checkpoint.write_text(path, page(run_dir))


def page(run_dir: Path) -> str:
    """The page as HTML; everything it shows is inside of it."""
    description = _description(run_dir / "options.json")
    stats_file = run_dir / "stats.jsonl"
    stats = read_stats(stats_file) if stats_file.exists() else []
    title = html.escape(run_dir.resolve().name)
    versions = description.pop("versions", {})
    snapshots = list(_snapshots(run_dir))
    body = "\n".join(
        (
            f"<h1>{title}</h1>",
            f'<p class="soft">{html.escape(_summary(description, stats))}</p>',
            *_warnings(run_dir),
            *_section("Curves", [_svg(figure) for figure in _curves(stats)]),
            *_section("Error by noise level", [_svg(figure) for figure in _noise_levels(stats)]),
            *_section("Magnitudes by resolution", [_svg(figure) for figure in _magnitudes(stats)]),
            *_out_of_range(stats),
            *_section("Pictures", [_picture(file, run_dir) for file in _pictures(run_dir)]),
            *_sweeps(run_dir),
            "<h2>Snapshots</h2>",
            _folded(_table(("file", "images", "sigma_rel", "MB"), snapshots), len(snapshots)),
            "<h2>Settings</h2>",
            _table(("name", "value"), list(_flat(description))),
            "<h2>Versions</h2>",
            _table(("of", "version"), list(_flat(versions))) if versions else "<p>Not recorded by this run.</p>",
        )
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n{body}\n'
        "</body></html>\n"
    )


def _description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no run: there is no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if not isinstance(description, dict) or not isinstance(description.get("options", {}), dict):
        raise UserError(f"{path} is damaged (expected an object with options)")
    return description


def _summary(description: dict[str, Any], stats: Sequence[dict[str, float]]) -> str:
    options = description.get("options", {})
    if not stats:
        return f"{options.get('data', '?')}: no statistics yet"
    last = stats[-1]
    seconds = last.get("Timing/total_sec", 0)
    hours, minutes = divmod(round(seconds / 60) if math.isfinite(seconds) else 0, 60)
    duration = options.get("duration")
    known = isinstance(duration, int) and duration > 0
    done = f" ({100 * last['Progress/kimg'] * 1000 / duration:.0f} % of {duration:,})" if known else ""
    return (
        f"{options.get('data', '?')}: {last['Progress/kimg'] * 1000:,.0f} images{done}, "
        f"{hours}:{minutes:02d} hours, loss {last.get('Loss/loss', math.nan):.4f}"
    )


def _warnings(run_dir: Path) -> Iterator[str]:
    """The warnings of the log, the newest last."""
    log = run_dir / "log.txt"
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if "WARNING" in line] if log.exists() else []
    if lines:
        yield f"<h2>Warnings ({len(lines)})</h2>"
        yield "".join(f'<div class="warning">{html.escape(line)}</div>' for line in lines[-20:])


def _section(title: str, parts: Sequence[str]) -> Iterator[str]:
    if parts:
        yield f'<h2>{title}</h2>\n<div class="plots">{"".join(parts)}</div>'


def _figure(ylabel: str, height: float = 3) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(True, color="#e2e8f0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("images seen (thousands)")
    axes.set_ylabel(ylabel)
    return figure, axes


def _series(stats: Sequence[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(entry["Progress/kimg"], entry[key]) for entry in stats if math.isfinite(entry.get(key, math.nan))]
    return [x for x, _ in points], [y for _, y in points]


def _curves(stats: Sequence[dict[str, float]]) -> Iterator[Figure]:
    yield from _lines(stats, {"": "Loss/loss"}, "loss (mean per pixel)", [BLUE])
    yield from _lines(stats, {"": "Loss/learning_rate"}, "learning rate", [ORANGE])
    yield from _lines(stats, {"": "Loss/effective_learning_rate"}, "learning rate / |weights|", [ORANGE])
    keys = dict.fromkeys(match.groups() for entry in stats for key in entry if (match := _METRIC.fullmatch(key)))
    for metric in dict.fromkeys(name for name, _ in keys):
        of_length = {f"EMA {width}": f"Metric/{name}/{width}" for name, width in keys if name == metric}
        yield from _lines(stats, of_length, f"{metric.upper()} to the data (EffLite0)")
    speeds = [
        {"Progress/kimg": entry["Progress/kimg"], "speed": 1000 / entry["Timing/sec_per_kimg"]}
        for entry in stats
        if entry.get("Timing/sec_per_kimg", math.nan) > 0
    ]
    yield from _lines(speeds, {"": "speed"}, "images per second", [GREY], from_zero=True)


def _lines(
    stats: Sequence[dict[str, float]],
    keys: dict[str, str],
    ylabel: str,
    colors: Sequence[str] = (),
    from_zero: bool = False,
) -> Iterator[Figure]:
    """A plot with a line for each entry of the statistics, by label; none where there is nothing to draw."""
    series = {label: _series(stats, key) for label, key in keys.items()}
    series = {label: points for label, points in series.items() if points[0]}
    if not series:
        return
    figure, axes = _figure(ylabel)
    if colors:
        axes.set_prop_cycle(color=colors)
    for label, (x, y) in series.items():
        axes.plot(x, y, ".-", linewidth=1.2, markersize=3, label=label or None)
    axes.set_xlim(0, 1.03 * stats[-1]["Progress/kimg"] or 1)
    if from_zero:
        axes.set_ylim(0, 1.08 * max(max(y) for _, y in series.values()) or 1)
    if any(series):
        axes.legend(frameon=False, fontsize="small", ncols=2)
    yield figure


def _magnitudes(stats: Sequence[dict[str, float]]) -> Iterator[Figure]:
    """As Figs. 3 and 15 of the paper: activations and weights, largest and mean, a line for each resolution."""
    names = dict.fromkeys(match[1] for entry in stats for key in entry if (match := _MAGNITUDE.fullmatch(key)))
    for kind in ("activations", "weights"):
        for which, label in (("max", "largest"), ("mean", "mean")):
            keys = {name: f"Magnitude/{name}/{kind}_{which}" for name in names}
            yield from _lines(stats, keys, f"{kind}, {label} magnitude", from_zero=True)


def _out_of_range(stats: Sequence[dict[str, float]]) -> Iterator[str]:
    """What the network's clip cut off, and gradients that were not finite; a sentence where there were none."""
    names = dict.fromkeys(match[1] for entry in stats for key in entry if (match := _CLIPPED.fullmatch(key)))
    clipped = {name: f"Magnitude/{name}/clipped" for name in names}
    happened = [key for key in (*clipped.values(), _NOT_FINITE) if any(entry.get(key, 0) > 0 for entry in stats)]
    yield from _section(
        "Out of range",
        [
            _svg(figure)
            for keys, label in (
                (clipped, "largest part clipped at ±256"),
                ({"": _NOT_FINITE}, "gradient values not finite"),
            )
            for figure in _lines(stats, {k: v for k, v in keys.items() if v in happened}, label, from_zero=True)
        ],
    )
    if stats and not happened:
        yield "<h2>Out of range</h2><p>No activation was clipped, and every gradient was finite, at all reports.</p>"


def _noise_levels(stats: Sequence[dict[str, float]]) -> Iterator[Figure]:
    """At the first, the middle and the last status that has them: the error of the denoised images, and what the
    network expects it to be."""
    known = [entry for entry in stats if any(map(_NOISE.fullmatch, entry))]
    if not known:
        return
    figure, axes = _figure("λ(σ) · squared error", height=3.6)
    axes.set_xlabel("noise level σ")
    axes.set_xscale("log")
    axes.set_yscale("log")
    chosen = {entry["Progress/kimg"]: entry for entry in (known[0], known[len(known) // 2], known[-1])}
    for color, (kimg, entry) in zip((GREY, ORANGE, BLUE), chosen.items(), strict=False):
        sigmas = [match[1] for key in entry if (match := _NOISE.fullmatch(key))]
        x = [float(sigma) for sigma in sigmas]
        seen = f"{kimg:,.0f}k" if kimg >= 10 else f"{kimg:.3g}k"
        axes.plot(x, [entry[f"Noise/{s}/error"] for s in sigmas], "o", color=color, label=f"{seen}: measured")
        expected = [entry.get(f"Noise/{s}/expected", math.nan) for s in sigmas]
        axes.plot(x, expected, color=color, linewidth=1.2, label="expected, exp u(σ)")
    figure.legend(frameon=False, fontsize="small", ncols=len(chosen), loc="outside lower center")
    yield figure


def _pictures(run_dir: Path) -> list[Path]:
    """The run's PNG files, but of the grids drawn during training the latest of each EMA length, and no plot of what
    this page plots itself."""
    files = [file for file in sorted(run_dir.glob("*.png")) if file.name not in (_SWEEP_PLOT, _LOSS_PLOT)]
    latest = {match[2]: file for file in files if (match := _SAMPLES.fullmatch(file.name))}
    return [file for file in files if not _SAMPLES.fullmatch(file.name) or file in latest.values()]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "edm2ext", "svg.fonttype": "none"}):  # the same page every time
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _picture(file: Path, run_dir: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    name = html.escape(str(file.relative_to(run_dir)))
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'


def _sweeps(run_dir: Path) -> Iterator[str]:
    """EMA lengths compared: what a demo leaves behind, and each `reconstruct search` into a folder within the run's."""
    demo = _json_lines(run_dir / "report.json", whole=True)
    swept = demo[0].get("sweep") if demo else None
    rows = [row for row in swept if isinstance(row, dict)] if isinstance(swept, list) else []
    plots = [run_dir / _SWEEP_PLOT] if rows and (run_dir / _SWEEP_PLOT).exists() else []
    tables = [_table(tuple(rows[0]), [tuple(row.values()) for row in rows])] if rows else []
    for best in sorted(run_dir.glob("*/best.json")):
        plots += [file for file in [best.with_name("sigma_rel.png")] if file.exists()]
        for found in _json_lines(best, whole=True):
            tables += _search_table(found, _json_lines(best.with_name("table.jsonl")))
    if plots or tables:
        yield "<h2>EMA lengths</h2>"
        yield f'<div class="plots">{"".join(_picture(file, run_dir) for file in plots)}</div>'
        yield from tables


def _search_table(found: dict[str, Any], measured: list[dict[str, Any]]) -> Iterator[str]:
    """All points of a search, whose table has what is to be large with the sign changed, in order of the first axis."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        sign = 1 if found["value"] == min(entry["value"] for entry in measured) else -1
        rows = [(*entry["point"].values(), sign * entry["value"]) for entry in measured]
        yield _table((*found["point"], found["metric"]), sorted(rows, key=str))


def _json_lines(path: Path, whole: bool = False) -> list[dict[str, Any]]:
    """The objects in a file, one a line, or the one that it is; none where it is missing or something else."""
    found = []
    with contextlib.suppress(OSError, ValueError, RecursionError):
        text = path.read_text(encoding="utf-8")
        for part in [text] if whole else text.splitlines():
            value = json.loads(part)
            found += [value] if isinstance(value, dict) else []
    return found


def _snapshots(run_dir: Path) -> Iterator[tuple[Any, ...]]:
    for file in sorted(run_dir.glob("*.safetensors")):
        header: dict[str, Any] = {}
        with contextlib.suppress(UserError):
            header = checkpoint.read_header(file)
        size = round(file.stat().st_size / 1e6, 1)
        yield file.name, header.get("nimg", "unreadable"), header.get("sigma_rel", ""), size


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, member in value.items():
            yield from _flat(member, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = f"{value:,}" if isinstance(value, int) and number else f"{value:.4g}" if number else str(value)
        return f'<td class="number">{text}</td>' if number else f"<td>{html.escape(text)}</td>"

    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    lines += ["".join(map(cell, row)) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _folded(table: str, rows: int) -> str:
    """A table that is folded up if it is long."""
    return f"<details{' open' * (rows <= 16)}><summary>{rows} files</summary>{table}</details>"


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write. [default: RUN/report.html]"
)
def main(run: Path, out: Path | None) -> None:
    """Write one HTML page about the run in directory RUN: curves, magnitudes, pictures, EMA lengths, snapshots and
    settings. It needs no network and no other file, and may be written while the run goes on."""
    path = out or run / "report.html"
    try:
        write_page(run, path)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
