"""Short training runs, in this process and in others, and what must not depend on interruptions."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor

from python_train import checkpoint, data
from python_train.config import TrainOptions, make_options
from python_train.loop import train
from python_train.run import main

TINY = make_options(
    "digits",
    model_channels=8,
    channel_mult=(1, 2),
    dropout=0.1,
    batch=64,
    duration=4096,
    rampup=1000,
    decay=20,
    status=512,
    snapshot=2048,
    checkpoint=1024,
    sample=0,
    tensorboard=False,
)


def run(options: TrainOptions, outdir: Path, **kwargs: object) -> int:
    return train(options, data.open_dataset(options.data, options.cond), outdir, **kwargs)


def same(a: object, b: object) -> bool:
    """Bit-exact equality of nested states."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def final_files(outdir: Path) -> dict[str, object]:
    """Everything of a run that must not depend on interruptions (times and memory sizes do)."""
    state = checkpoint.load_state(checkpoint.list_states(outdir)[0])
    state.pop("elapsed")
    options = json.loads((outdir / "options.json").read_text())
    assert state.pop("run") == options.pop("run")
    lines = [json.loads(line) for line in (outdir / "stats.jsonl").read_text().splitlines()]
    return {
        "state": state,
        "snapshots": {path.name: path.read_bytes() for path in sorted(outdir.glob("*.safetensors"))},
        "stats": [(line["Progress/kimg"], line["Loss/loss"], line["Loss/learning_rate"]) for line in lines[1:]],
        "options": options,
    }


_OPTIONS = (
    "--preset digits --channels 8 --blocks 1 --channel-mult 1,2 --batch 64 --rampup 1000 --decay 20 --dropout 0.1 "
    "--status 512 --snapshot 2048 --checkpoint 1024 --sample 0 --no-tensorboard --device cpu"
)


def command(outdir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "python_train.run", *_OPTIONS.split(), "--outdir", str(outdir), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# Processes are forked off one that has imported everything: a start takes no time.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["python_train.run", "python_train.demo", "sklearn.datasets", "torch._dynamo"])


def fork(work: Callable[..., None], *arguments: object, log: Path) -> BaseProcess:
    """Call a function in a process of its own, its output in a file; it ends with the exit code of `sys.exit`."""
    process = _context.Process(target=_work, args=(work, arguments, str(log)))
    process.start()
    return process


def _work(work: Callable[..., None], arguments: tuple, log: str) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its own processes, as usual
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(*arguments)


def start(outdir: Path, *more: str) -> BaseProcess:
    """The training command in a process of its own; what it prints goes to OUTDIR.out."""
    return fork(_command, command(outdir, *more)[3:], log=outdir.with_suffix(".out"))


def _command(arguments: list[str]) -> None:
    main(arguments)


def children(pid: int) -> list[int]:
    """The processes that a process has started, and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(folder.name))
    return found


def check_listed_files(outdir: Path) -> None:
    """Every file that a run shows is whole."""
    for path in checkpoint.list_states(outdir):
        checkpoint.load_state(path)
    for path in outdir.glob("*.safetensors"):
        checkpoint.load_snapshot(path)
    if (outdir / "options.json").exists():
        json.loads((outdir / "options.json").read_text())
