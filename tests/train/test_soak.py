"""Training for a long time: memory, open files, threads and processes stay as many, and nothing but the wanted files is
left. EDM2EXT_SOAK_SECONDS says how long; `make soak` takes two hours."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from runs import TINY, check_listed_files, children

from python_train import checkpoint, data, loop, reporter
from python_train.stop import StopRequest

SECONDS = float(os.environ.get("EDM2EXT_SOAK_SECONDS", "120"))
GROWTH = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Used:
    """What this process holds."""

    memory: int
    files: int
    threads: int
    processes: int


def used() -> Used:
    gc.collect()
    files, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
    return Used(reporter._resident_bytes(), files, threads, len(children(os.getpid())))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads and files by /proc")
def test_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first quarter on, a run that reads with processes of its own, and reports, saves and snapshots all the
    time, occupies no more than before."""
    (tmp_path / "images").mkdir()
    for index, image in enumerate(np.random.default_rng(0).integers(0, 256, [300, 8, 8], dtype=np.uint8)):
        PIL.Image.fromarray(image).save(tmp_path / "images" / f"{index:03d}.png")
    options = dataclasses.replace(
        TINY,
        data="images",
        cond=False,
        batch_gpu=32,
        duration=2**40,
        status=1024,
        snapshot=4096,
        checkpoint=2048,
        tensorboard=True,
    )
    samples: list[Used] = []
    before = used().processes  # of other tests
    status, began = reporter.Reporter.status, time.monotonic()

    def sampled(self: reporter.Reporter, draw: bool) -> float:
        samples.append(used())
        return status(self, draw)

    monkeypatch.setattr(reporter.Reporter, "status", sampled)
    monkeypatch.setattr(StopRequest, "agreed", lambda self: time.monotonic() > began + SECONDS)
    dataset = data.open_dataset(tmp_path / "images", cond=False, cache_bytes=0, workers=2)
    with pytest.raises(loop.Stopped):
        loop.train(options, dataset, tmp_path / "run")
    quarter, later = samples[len(samples) // 4], samples[len(samples) // 4 :]
    assert max(sample.memory for sample in later) - quarter.memory < GROWTH
    assert max(sample.files for sample in later) <= quarter.files + 2  # a file that the writer has open
    assert max(sample.threads for sample in later) <= quarter.threads + 1  # that writer
    assert max(sample.processes for sample in later) == quarter.processes == before + 2
    assert len(checkpoint.list_states(tmp_path / "run")) == options.keep
    assert not list((tmp_path / "run").glob(".*"))
    check_listed_files(tmp_path / "run")
