"""Launches and memory traffic of one training step, counted without a GPU and without memory for the network.

python benchmarks/traffic.py --preset img512-s --batch 32 [--dtype fp16] [--backend native|reference] [--json FILE]
    [--force-normalize forward|step]

The step of `python_train.trainer` (for plain torch that of `benchmarks.plain_step`) runs on meta tensors: see
`edm2ext.traffic`.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import click
import torch

import edm2ext
from benchmarks.plain_step import PlainTrainer
from edm2ext.traffic import PHASES, Counter, Traffic, counting
from python_train.config import FORCE_NORMALIZE, PRESETS, make_options
from python_train.network import Precond
from python_train.trainer import COMPUTE_DTYPES, Trainer
from python_train.world import World

_RESOLUTION_CHANNELS_LABELS = {"img512": (64, 4, 1000), "img64": (64, 3, 1000), "digits": (8, 1, 10)}


def count_step(
    preset: str, batch: int, dtype: str | None = None, backend: str = "native", force_normalize: str | None = None
) -> Counter:
    """Counts one optimizer step of the preset's network over a batch, all of it in one round.

    dtype is "fp32", "fp16" or "bf16", by default the preset's; backend "native" or "reference". Raises RuntimeError if
    the library for "native" is missing or holds no CUDA kernels.
    """
    if backend == "native" and not edm2ext.build_info()["cuda_compiled"]:
        raise RuntimeError("--backend native needs a library with CUDA kernels: set EDM2EXT_CUDA=ON and run make setup")
    resolution, channels, label_dim = _RESOLUTION_CHANNELS_LABELS[preset.split("-")[0]]
    options = make_options(preset, batch=batch, batch_gpu=batch, precision=dtype, force_normalize=force_normalize)
    with torch.device("meta"), edm2ext.set_backend(backend), _adam_takes_meta():
        net = Precond(**options.network_config(resolution, channels, label_dim))
        encoded = SimpleNamespace(encode=lambda images: images)
        if backend == "native":
            trainer = Trainer(net, options, encoded, World(device=torch.device("meta")))
        else:
            trainer = PlainTrainer(net, options, encoded)
        batches = itertools.repeat(
            (torch.empty(batch, channels, resolution, resolution), torch.empty(batch, label_dim))
        )
        with counting():
            trainer.step(batches)  # makes the optimizer's state
        with counting() as counter:
            trainer.step(batches)
    return counter


def _adam_takes_meta() -> contextlib.AbstractContextManager:
    """torch's fused Adam asks for a device that has it; on meta tensors it would run as well."""
    module = sys.modules[torch.optim.Adam.__module__]  # torch.optim deletes its name
    return mock.patch.object(module, "_device_dtype_check_for_fused")


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _cells(row: Traffic) -> tuple[str, ...]:
    return f"{row.launches:,}", *(f"{number / 1e9:.2f}" for number in (row.read, row.written, row.bytes))


def table(counter: Counter, most: int) -> Iterator[str]:
    """Markdown: by phase and kind, then the ops that move most, forward and backward together."""
    yield from ("| | launches | GB read | GB written | GB |", "|---|---:|---:|---:|---:|")
    both = [key for key in counter.rows if key.phase != "update"]
    sums = {
        "forward": counter.total(phase="forward"),
        "backward": counter.total(phase="backward"),
        "**forward + backward**": counter.total(phase="forward") + counter.total(phase="backward"),
        **{
            f"of it: {text}": sum((counter.rows[key] for key in both if key.kind in kinds), Traffic())
            for text, kinds in {
                "products": ("product",),
                "native kernels": ("native",),
                "plain torch": ("plain",),
                "**outside products**": ("native", "plain"),
            }.items()
        },
        "optimizer and EMA": counter.total(phase="update"),
    }
    yield from (_line(name, *_cells(row)) for name, row in sums.items())
    yield f"\nHost synchronisations: {counter.synchronisations}.\n"
    for title, phases in {"Forward + backward": PHASES[:2], "Optimizer and EMA": PHASES[2:]}.items():
        ops: dict[tuple[str, str], Traffic] = {}
        for key, row in counter.rows.items():
            if key.phase in phases:
                ops[key.kind, key.op] = ops.get((key.kind, key.op), Traffic()) + row
        order = sorted(ops, key=lambda op: -ops[op].bytes)
        yield from (f"| {title} | kind | launches | GB read | GB written | GB |", "|---|---|---:|---:|---:|---:|")
        yield from (_line(f"`{op}`", kind, *_cells(ops[kind, op])) for kind, op in order[:most])
        if rest := order[most:]:
            yield _line(f"{len(rest)} others", "", *_cells(sum((ops[op] for op in rest), Traffic())))
        yield ""


def as_json(counter: Counter, **facts: object) -> str:
    rows = [{**key._asdict(), **dataclasses.asdict(row)} for key, row in sorted(counter.rows.items())]
    return json.dumps({**facts, "host_synchronisations": counter.synchronisations, "rows": rows}, indent=1) + "\n"


@click.command(help=__doc__)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="img512-s", show_default=True)
@click.option("--batch", default=32, show_default=True, help="Images of the step.")
@click.option("--dtype", type=click.Choice(list(COMPUTE_DTYPES)), help="Of the activations.  [default: the preset's]")
@click.option("--backend", type=click.Choice(["native", "reference"]), default="native", show_default=True)
@click.option("--force-normalize", type=click.Choice(FORCE_NORMALIZE), default="forward", show_default=True)
@click.option("--top", default=25, show_default=True, help="Ops to list by name.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Also write every row to this file."
)
def main(
    preset: str, batch: int, dtype: str | None, backend: str, force_normalize: str, top: int, file: Path | None
) -> None:
    try:
        counter = count_step(preset, batch, dtype, backend, force_normalize)
    except RuntimeError as error:
        sys.exit(str(error))
    facts = {"preset": preset, "batch": batch, "dtype": dtype or make_options(preset).precision, "backend": backend}
    facts["force_normalize"] = force_normalize
    print(", ".join(f"{key} {value}" for key, value in facts.items()), f"torch {torch.__version__}\n", sep=", ")
    print("\n".join(table(counter, top)))
    if file is not None:
        file.write_text(as_json(counter, **facts, torch=torch.__version__), encoding="utf-8")


if __name__ == "__main__":
    main()
