"""What saving costs a training run, in the loop's time: ``python -m benchmarks.saving [CHANNELS]``.

Trains EDM2's 64x64 network with few channels on a CPU and saves both snapshots and the training state as the loop does,
in a thread, and, for comparison, waiting for it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from python_train.config import make_options
from python_train.data import PixelEncoder
from python_train.loop import build_network
from python_train.run_dir import RunDir
from python_train.saving import Saver
from python_train.trainer import Trainer

SAVES = 3
DEFAULT = make_options("img64-s")


def seconds(work: object) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)  # the writer has the other core, as on a machine with a GPU
    channels = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    options = make_options("img64-s", model_channels=channels, batch=1, precision="fp32", rampup=0)
    trainer = Trainer(build_network(options, 64, 3, 1000), options, PixelEncoder())
    parameters = sum(param.numel() for param in trainer.params)
    batch = torch.randint(0, 256, [1, 3, 64, 64], dtype=torch.uint8), torch.eye(1000)[:1]

    def step() -> float:
        return seconds(lambda: trainer.step(iter([batch])))

    step()
    held, waiting, alone, beside = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run", {"options": options.to_json()})
        saver = Saver(trainer, run, {}, {})
        for _ in range(SAVES):
            alone += [step(), step()]
            held.append(seconds(lambda: saver.save(snapshots=True, state=True, elapsed=0)))
            while not saver.writer._pending.done():
                beside.append(step())
            waiting.append(seconds(lambda: (saver.save(snapshots=True, state=True, elapsed=0), saver.wait())))
        written = sum(path.stat().st_size for path in run.path.iterdir())
        saver.close()
        run.close()
    median = {name: statistics.median(values) for name, values in
              (("held", held), ("waiting", waiting), ("alone", alone), ("beside", beside))}  # fmt: skip
    slowed = max(0.0, median["beside"] - median["alone"]) * len(beside) / SAVES
    per_save = median["held"] + slowed
    print(f"{parameters:,} parameters, {written / 1e9:.2f} GB in the run's files")
    print(f"a step of one image: {median['alone']:.2f} s, beside a writing thread {median['beside']:.2f} s")
    print(f"a save of both snapshots and the training state: the loop is held for {median['held']:.2f} s and slowed by "
          f"{slowed:.2f} s in all; waiting for the files would take {median['waiting']:.2f} s")  # fmt: skip
    for name, interval in (("snapshots and a state", DEFAULT.snapshot), ("the same", 64 * 2**10)):
        steps = interval // DEFAULT.batch
        share = per_save / (steps * median["alone"])
        print(f"{name} every {steps:,} steps, were a step of {DEFAULT.batch} images as short as one of one image here: "
              f"{100 * share:.3f} % of the time")  # fmt: skip


if __name__ == "__main__":
    main()
