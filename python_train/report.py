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
.soft { color: var(--soft); } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots > * { flex: 1 1 30rem; background: #ffffff; border: 1px solid var(--line); border-radius: 6px; }
svg, img { max-width: 100%; height: auto; } img { image-rendering: auto; border-radius: 6px; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .85rem; padding: .2rem .5rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1.2rem .15rem 0;
        border-bottom: 1px solid var(--line); vertical-align: top; } td.number { text-align: right; }
pre { overflow-x: auto; font-size: .8rem; border: 1px solid var(--line); border-radius: 6px; padding: .7rem; }
.warning { color: #c05621; }
"""
_NOISE = re.compile(r"Noise/(.+)/error")
_SAMPLES = re.compile(r"samples-(\d+)-(.+)\.png")
_MAGNITUDE = re.compile(r"Magnitude/(.+)/(activations|weights)_(max|mean)")


def write_page(run_dir: Path, path: Path) -> None:
    """Write the page about the run in ``run_dir`` to ``path``, whole or not at all.

    Raises UserError if the directory holds no run, and OSError if the page cannot be written.
    """
    checkpoint.write_text(path, page(run_dir))


def page(run_dir: Path) -> str:
    """The page as HTML; everything it shows is inside of it."""
    try:
        description = json.loads((run_dir / "options.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run_dir} holds no run: there is no options.json") from None
    except ValueError as error:
        raise UserError(f"{run_dir / 'options.json'} is damaged ({error})") from error
    stats_file = run_dir / "stats.jsonl"
    stats = read_stats(stats_file) if stats_file.exists() else []
    title = html.escape(run_dir.resolve().name)
    body = "\n".join(
        (
            f"<h1>{title}</h1>",
            f'<p class="soft">{html.escape(_summary(description, stats))}</p>',
            *_warnings(run_dir),
            *_section("Curves", [_svg(figure) for figure in _curves(stats)]),
            *_section("Error by noise level", [_svg(figure) for figure in _noise_levels(stats)]),
            *_section("Magnitudes by resolution", [_svg(figure) for figure in _magnitudes(stats)]),
            *_section("Pictures", [_picture(file) for file in _pictures(run_dir)]),
            *_sweep(run_dir),
            "<h2>Snapshots</h2>",
            _table(("file", "images", "sigma_rel", "MB"), list(_snapshots(run_dir))),
            "<h2>Settings</h2>",
            _table(("name", "value"), list(_flat(description))),
        )
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n{body}\n'
        "</body></html>\n"
    )


def _summary(description: dict[str, Any], stats: Sequence[dict[str, float]]) -> str:
    options = description.get("options", {})
    if not stats:
        return f"{options.get('data', '?')}: no statistics yet"
    last = stats[-1]
    hours, minutes = divmod(round(last.get("Timing/total_sec", 0) / 60), 60)
    duration = options.get("duration", 0)
    done = f"{100 * last['Progress/kimg'] * 1000 / duration:.0f} % of {duration:,}" if duration else ""
    return (
        f"{options.get('data', '?')}: {last['Progress/kimg'] * 1000:,.0f} images ({done}), "
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


def _figure(ylabel: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, 3), layout="constrained")
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
    curves = [
        ("Loss/loss", "loss (mean per pixel)", BLUE),
        ("Loss/learning_rate", "learning rate", ORANGE),
        ("Loss/effective_learning_rate", "learning rate / magnitude of weights", ORANGE),
    ]
    metrics = dict.fromkeys(key for entry in stats for key in entry if key.startswith("Metric/"))
    curves += [(key, key.removeprefix("Metric/"), BLUE) for key in metrics]
    for key, label, color in curves:
        x, y = _series(stats, key)
        if x:
            figure, axes = _figure(label)
            axes.plot(x, y, ".-", color=color, linewidth=1, markersize=3)
            yield figure
    x, y = _series(stats, "Timing/sec_per_kimg")
    if x:
        figure, axes = _figure("images per second")
        axes.plot(x, [1000 / seconds if seconds else math.nan for seconds in y], ".-", color=GREY, linewidth=1)
        axes.set_ylim(bottom=0)
        yield figure


def _magnitudes(stats: Sequence[dict[str, float]]) -> Iterator[Figure]:
    """As Figs. 3 and 15 of the paper: activations and weights, largest and mean, a line for each resolution."""
    keys = list(dict.fromkeys(key for entry in stats for key in entry if _MAGNITUDE.fullmatch(key)))
    for kind in ("activations", "weights"):
        for which in ("max", "mean"):
            chosen = [key for key in keys if key.endswith(f"/{kind}_{which}")]
            if chosen:
                figure, axes = _figure(f"{kind}, {'largest' if which == 'max' else 'mean'} magnitude")
                for key in chosen:
                    name = _MAGNITUDE.fullmatch(key)[1]  # type: ignore[index]
                    axes.plot(*_series(stats, key), linewidth=1.2, label=name)
                axes.set_ylim(bottom=0)
                axes.legend(frameon=False, fontsize="small", ncols=2)
                yield figure


def _noise_levels(stats: Sequence[dict[str, float]]) -> Iterator[Figure]:
    """At the first, the middle and the last status that has them: the error of the denoised images, and what the
    network expects it to be."""
    known = [entry for entry in stats if any(map(_NOISE.fullmatch, entry))]
    if not known:
        return
    figure, axes = _figure("λ(σ) · squared error")
    axes.set_xlabel("noise level σ")
    axes.set_xscale("log")
    axes.set_yscale("log")
    chosen = {entry["Progress/kimg"]: entry for entry in (known[0], known[len(known) // 2], known[-1])}
    for color, (kimg, entry) in zip((GREY, ORANGE, BLUE), chosen.items(), strict=False):
        sigmas = [match[1] for key in entry if (match := _NOISE.fullmatch(key))]
        x = [float(sigma) for sigma in sigmas]
        axes.plot(x, [entry[f"Noise/{s}/error"] for s in sigmas], "o", color=color, label=f"{kimg:,.0f}k: measured")
        expected = [entry.get(f"Noise/{s}/expected", math.nan) for s in sigmas]
        axes.plot(x, expected, color=color, linewidth=1.2, label="expected, exp u(σ)")
    axes.legend(frameon=False, fontsize="small", ncols=len(chosen))
    yield figure


def _pictures(run_dir: Path) -> list[Path]:
    """All of the run's PNG files, but of the grids drawn during training the latest of each EMA length."""
    files = sorted(run_dir.glob("*.png"))
    latest = {match[2]: file for file in files if (match := _SAMPLES.fullmatch(file.name))}
    return [file for file in files if not _SAMPLES.fullmatch(file.name) or file in latest.values()]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "edm2ext", "svg.fonttype": "none"}):  # the same page every time
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _picture(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    name = html.escape(file.name)
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'


def _sweep(run_dir: Path) -> Iterator[str]:
    """The table of EMA lengths that a demo leaves behind."""
    file = run_dir / "report.json"
    if not file.exists():
        return
    points = json.loads(file.read_text(encoding="utf-8")).get("sweep", [])
    if points:
        yield "<h2>EMA lengths</h2>"
        yield _table(tuple(points[0]), [tuple(point.values()) for point in points])


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
