"""How fast data sets are read, in images a second of one core: ``python -m benchmarks.data_speed``.

Writes its own data sets, as the official ones are made: 64x64 PNG of compression level 0, and 8x64x64 float32 latents.
"""

from __future__ import annotations

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


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        for kind, items in (("64x64 PNG, level 0", png_items(0)), ("latents 8x64x64", latent_items())):
            index = ("dataset.json", Index([(name, i % 10) for i, (name, _) in enumerate(items)]).to_json().encode())
            for container in ("zip", "folder"):
                path = Path(scratch) / f"{kind[:3].strip()}.{container}"
                (write_zip if container == "zip" else write_folder)(path, [*items, index])
                dataset = open_dataset(path)
                reads = rate(lambda dataset=dataset: len(dataset.__getitems__(rng.integers(0, ITEMS, 128))[0]))
                print(f"| {kind} | {container}, batches of 128 | {reads:,.0f} |")
            raw = Path(scratch) / "raw.npy"
            np.save(raw, np.stack([dataset.read(i) for i in range(ITEMS)]))
            mapped = np.load(raw, mmap_mode="r")
            reads = rate(lambda mapped=mapped: len(mapped[rng.integers(0, ITEMS, 128)]))
            print(f"| {kind} | one array, memory-mapped, no checksum | {reads:,.0f} |")
            dataset = open_dataset(Path(scratch) / f"{kind[:3].strip()}.zip")
            dataset.preload()
            stream = batches(dataset, 128, IndexStream(ITEMS, 0), torch.device("cpu"))
            print(f"| {kind} | zip, cached in memory | {rate(lambda stream=stream: len(next(stream)[0])):,.0f} |")
            dataset = open_dataset(Path(scratch) / f"{kind[:3].strip()}.zip", cache_bytes=0, workers=2)
            stream = batches(dataset, 128, IndexStream(ITEMS, 0), torch.device("cpu"))
            next(stream)
            start, done = time.perf_counter(), 0
            while time.perf_counter() - start < 2 * SECONDS:
                done += len(next(stream)[0])
            print(f"| {kind} | zip, loader of 2 processes, wall clock | {done / (time.perf_counter() - start):,.0f} |")
            stream.close()


if __name__ == "__main__":
    main()
