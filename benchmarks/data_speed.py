"""How fast data sets are read, in images a second of one core, and what the loader takes to feed a training step:
``python -m benchmarks.data_speed [reading|loader]``.

Writes its own data sets, as the official ones are made: 64x64 PNG of compression level 0, and 8x64x64 float32 latents.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from python_train.data import IndexStream, batches, open_dataset
from python_train.data.container import Index, item_name, write_folder, write_zip
from python_train.data.images import encode_png

ITEMS, SECONDS = 1024, 2.0
WORKERS, BATCH, STEP_RATE = 2, 128, 1500  # images/s of EDM2-XS


def png_items(compress_level: int) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 180, 64)[:, None, None] + rng.integers(0, 60, [ITEMS, 64, 64, 3])
    pictures = [PIL.Image.fromarray(pixels) for pixels in smooth.astype(np.uint8)]
    return [(item_name(i), encode_png(picture)) for i, picture in enumerate(pictures)]


def latent_items() -> list[tuple[str, bytes]]:
    import io

    rng = np.random.default_rng(0)
    items = []
    for i in range(ITEMS):
        file = io.BytesIO()
        np.save(file, rng.standard_normal([8, 64, 64]).astype(np.float32))
        items.append((item_name(i, ".npy", "img-mean-std-"), file.getvalue()))
    return items


def rate(work: Callable[[], int]) -> float:
    """Images a second of processor time, the best of three runs of at least SECONDS."""
    best = 0.0
    for _ in range(3):
        start, done = time.process_time(), 0
        while time.process_time() - start < SECONDS:
            done += work()
        best = max(best, done / (time.process_time() - start))
    return best


def processor_time() -> float:
    """Seconds of this process and of those that read for it."""
    ticks = os.sysconf("SC_CLK_TCK")
    stats = [Path(f"/proc/{child.pid}/stat").read_text() for child in multiprocessing.active_children()]
    readers = sum(sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats)
    return time.process_time() + readers / ticks


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["reading", "loader"]
    with tempfile.TemporaryDirectory() as scratch:
        for kind, items in (("64x64 PNG, level 0", png_items(0)), ("latents 8x64x64", latent_items())):
            index = ("dataset.json", Index([(name, i % 10) for i, (name, _) in enumerate(items)]).to_json().encode())
            folder = Path(scratch) / kind[:3].strip()
            write_zip(folder.with_suffix(".zip"), [*items, index])
            if "reading" in wanted:
                write_folder(folder, [*items, index])
                reading(kind, folder)
            if "loader" in wanted:
                loader(kind, folder.with_suffix(".zip"))


def reading(kind: str, folder: Path) -> None:
    """Of the folder and of the ZIP beside it, in one process."""
    rng = np.random.default_rng(0)
    archive = folder.with_suffix(".zip")
    for container, path in (("zip", archive), ("folder", folder)):
        dataset = open_dataset(path)
        reads = rate(lambda dataset=dataset: len(dataset.__getitems__(rng.integers(0, ITEMS, BATCH))[0]))
        print(f"| {kind} | {container}, batches of {BATCH} | {reads:,.0f} |")
    raw = folder.with_suffix(".npy")
    np.save(raw, np.stack([dataset.read(i) for i in range(ITEMS)]))
    mapped = np.load(raw, mmap_mode="r")
    reads = rate(lambda: len(mapped[rng.integers(0, ITEMS, BATCH)]))
    print(f"| {kind} | one array, memory-mapped, no checksum | {reads:,.0f} |")
    dataset = open_dataset(archive)
    dataset.preload()
    stream = batches(dataset, BATCH, IndexStream(ITEMS, 0), torch.device("cpu"))
    print(f"| {kind} | zip, cached in memory | {rate(lambda: len(next(stream)[0])):,.0f} |")


def loader(kind: str, archive: Path) -> None:
    """Processor time of all processes for an image; and how long a step waits for its images that does nothing but last
    as long as one of EDM2-XS at STEP_RATE. Taking over a batch that is ready is part of the wait."""
    dataset = open_dataset(archive, cache_bytes=0, workers=WORKERS)
    stream = batches(dataset, BATCH, IndexStream(ITEMS, 0), torch.device("cpu"))
    next(stream)
    busy, here, done = processor_time(), time.process_time(), 0
    while processor_time() - busy < 3 * SECONDS:
        done += len(next(stream)[0])
    busy, here = processor_time() - busy, time.process_time() - here
    print(f"| {kind} | loader: processor time of an image, all {WORKERS + 1} processes | {1e6 * busy / done:,.0f} us |")
    print(f"| {kind} | the same, of the process that trains | {1e6 * here / done:,.0f} us |")
    print(f"| {kind} | cores at {STEP_RATE:,} images/s, all processes | {STEP_RATE * busy / done:.2f} |")
    waits = []
    for _ in range(round(10 * SECONDS * STEP_RATE / BATCH)):
        time.sleep(BATCH / STEP_RATE)
        start = time.perf_counter()
        next(stream)
        waits.append(time.perf_counter() - start)
    median, late, longest = (1e3 * float(np.quantile(waits, q)) for q in (0.5, 0.99, 1))
    step = BATCH / STEP_RATE
    print(f"| {kind} | {len(waits)} steps of {1e3 * step:.0f} ms wait for {BATCH} images each, wall clock: median, "
          f"99 %, longest | {median:.1f}, {late:.1f}, {longest:.1f} ms |")  # fmt: skip
    print(f"| {kind} | images/s of these steps, waits included | {BATCH / (step + np.mean(waits)):,.0f} |")
    stream.close()


if __name__ == "__main__":
    main()
