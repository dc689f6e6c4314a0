"""The order of the data (spec 4.7), and batches read ahead."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from python_train import UserError
from python_train.data.reader import Dataset
from python_train.rng import epoch_order


class IndexStream(torch.utils.data.Sampler[int]):
    """Endless item indices of one process: images start + rank, start + rank + world_size, ... of the run, each epoch
    a full permutation (spec 4.7). Depends on nothing but its arguments."""

    def __init__(self, num_items: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.num_items = num_items
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[int]:
        epoch, order = -1, np.empty([0])
        for image in itertools.count(self.start + self.rank, self.world_size):
            if image // self.num_items != epoch:
                epoch = image // self.num_items
                order = epoch_order(self.seed, epoch, self.num_items)
            yield int(order[image % self.num_items])


def batches(
    dataset: Dataset, batch: int, indices: IndexStream, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (stored images [batch, C, H, W], labels [batch, label_dim]) on ``device``.

    A preloaded data set is kept on the device; any other is read ahead by ``dataset.workers`` processes.
    """
    if dataset.in_memory is not None:
        images, labels = (value.to(device) for value in dataset.in_memory)
        stream = iter(indices)
        while True:
            chosen = torch.tensor(list(itertools.islice(stream, batch)), pin_memory=device.type == "cuda")
            chosen = chosen.to(device, non_blocking=True)
            stored = chosen % len(images)
            rows = images[stored]
            if dataset.xflip:
                mirrored = (chosen >= len(images)).reshape(-1, 1, 1, 1)
                rows = torch.where(mirrored, rows.flip(-1), rows)
            yield rows, labels[stored]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=batch,
        sampler=indices,
        num_workers=dataset.workers,
        prefetch_factor=2 if dataset.workers else None,
        pin_memory=device.type == "cuda",
        collate_fn=whole_batch,
    )
    for images, labels in read_ahead(loader):
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def whole_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What a loader makes of a batch that ``Dataset.__getitems__`` has put together: nothing."""
    return batch


def read_ahead(loader: torch.utils.data.DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches; a UserError in one of its processes as it was, without the traceback they wrap it in, and
    one that names the process if one of them was killed."""
    try:
        with _no_error_between_batches():
            stream = iter(loader)
        yield from stream
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from None
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two: before it handed its batch over
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a process that reads data is gone; was it killed for its memory? ({error})") from error


@contextlib.contextmanager
def _no_error_between_batches() -> Iterator[None]:
    """Undo that a loader made here raises an error when one of its processes ends, wherever the program may be: in the
    middle of an optimizer step, say. It looks after them itself when it waits for a batch."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
