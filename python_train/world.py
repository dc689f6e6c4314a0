"""The processes of a data-parallel run, and the device of each."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from python_train import UserError

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those of a data-parallel run; a run without torchrun is a world of one."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        if self.size > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values.cpu()

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """Overwrite a contiguous tensor on the process's device by that of process ``source``, and return it."""
        if self.size > 1:
            torch.distributed.broadcast(values, source)
        return values

    def first(self, work: Callable[[], Result]) -> Result | None:
        """Do ``work`` on rank 0, and return there what it returns, None elsewhere. Where it fails all processes end:
        rank 0 by the error, the others, which would wait for it in vain, quietly (SystemExit)."""
        result, failed = None, [False]
        try:
            result = work() if self.rank == 0 else None
        except Exception:
            failed = [True]
            raise
        finally:
            if self.size > 1:
                torch.distributed.broadcast_object_list(failed, src=0)
        if failed[0]:
            raise SystemExit(1)
        return result

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def check_equal(self, net: torch.nn.Module) -> None:
        """Raise RuntimeError, naming the tensor, where this process's parameters or buffers differ from rank 0's.
        Shards of parameters are its own."""
        if self.size == 1:
            return
        state = net.state_dict().items()
        for name, value in ((name, value) for name, value in state if type(value) is Tensor):
            first = value.clone()
            torch.distributed.broadcast(first, src=0)
            if not torch.equal(first.nan_to_num(), value.nan_to_num()):
                raise RuntimeError(f"rank {self.rank}: {name} differs from rank 0's; the processes have diverged")


@contextlib.contextmanager
def open_world(device: str | None = None) -> Iterator[World]:
    """Join the processes that torchrun started (environment WORLD_SIZE, RANK, LOCAL_RANK), or be alone.

    ``device`` None means a GPU if there is one. Communicates by nccl between GPUs and gloo between CPUs.
    Raises UserError if the device does not exist.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError(f"expected cpu or cuda, and not {chosen.type}")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {kind!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if size == 1:
        yield World(device=chosen)
        return
    # DDP, FSDP and their states import these. After init_process_group the imports would hold the group until the
    # interpreter ends, whose end its threads do not always survive: "terminate called without an active exception".
    for module in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"):
        importlib.import_module(module)
    # torchrun keeps its store when it starts the processes again, with the addresses of those that are gone.
    store, rank, size = next(iter(torch.distributed.rendezvous("env://")))
    store = torch.distributed.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, chosen)
    finally:
        gc.collect()  # what is left of DDP holds the group too
        torch.distributed.destroy_process_group()
