"""Training states of runs whose parameters are shared out: folders of torch.distributed.checkpoint, for any number of
processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edm2ext import tune
from python_train.checkpoint import DamagedError

if TYPE_CHECKING:
    from python_train.trainer import Trainer

_CHECKSUMS = "checksums.json"
_FACTS = "run.json"
_LOSS = "loss_sum"
_SCALE = "loss_scale."


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The training state as named tensors, to save or to load into; shards know their place in the whole."""
    trainer.optimizer.make_state()
    shards = trainer.shards
    nonfinite = trainer.optimizer.nonfinite if shards is None else shards.total(trainer.optimizer.nonfinite)
    state = {
        "nimg": torch.tensor(trainer.nimg),
        _LOSS: trainer.loss_sum * trainer.world.size,
        "nonfinite": nonfinite.clone(),
        "elapsed": torch.zeros((), dtype=torch.float64),
    }
    state |= {f"net.{name}": buffer for name, buffer in trainer.net.named_buffers()}
    if trainer.options.loss_scaling == "dynamic":
        state |= {_SCALE + name: tensor for name, tensor in trainer.loss_scale.state_dict().items()}
    for i, (name, param) in enumerate(zip(trainer.names, trainer.params, strict=True)):
        adam = trainer.optimizer.state[param]
        averages = {
            f"ema-{sigma_rel}": trainer.ema.profiles[k][i] for k, sigma_rel in enumerate(trainer.ema.sigma_rels)
        }
        tensors = {"net": param.detach(), "exp_avg": adam["exp_avg"], "exp_avg_sq": adam["exp_avg_sq"], **averages}
        for kind, tensor in tensors.items():
            state[f"{kind}.{name}"] = tensor if shards is None else shards.spread(tensor, shards.whole[i])
        state[f"step.{name}"] = adam["step"]
    return state


def begin_save(
    path: Path, trainer: Trainer, elapsed: float, run: str, group: torch.distributed.ProcessGroup
) -> Callable[[], None]:
    """Copy the training state, and begin to write it, while training goes on, as a folder of
    torch.distributed.checkpoint, to which every process adds its part. What is returned waits for that and completes
    the folder.

    The folder appears when it is whole, with checksums of its files, and says of which ``run`` it is. Every process
    must call both, and see the same file system; ``group``, of a backend for CPUs, is theirs alone until the folder is
    complete. Completing it raises OSError on every process if any cannot write.
    """
    import torch.distributed.checkpoint as dcp  # 2 seconds

    rank, size = trainer.world.rank, trainer.world.size
    facts = {"run": run, "nimg": trainer.nimg, "convolutions": tune.choices()}
    temporary = path.with_name(f".{path.name}.tmp")
    state = _tensors(trainer)
    state["elapsed"].fill_(elapsed)
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    torch.distributed.barrier(group)
    written = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(temporary), process_group=group)

    def complete() -> None:
        try:
            written.result()
        except dcp.CheckpointException as error:
            causes = [failure for failure, _ in error.failures.values()]
            raise OSError(f"cannot write {path}: {causes[0]}") from error
        own = {file.name: _checksum(file) for file in temporary.glob(f"__{rank}_*")}
        parts: list[dict[str, int]] = [own] * size
        torch.distributed.all_gather_object(parts, own, group)
        if rank == 0:
            sums = {name: value for part in parts for name, value in part.items()}
            (temporary / _FACTS).write_text(json.dumps(facts))
            sums |= {name: _checksum(temporary / name) for name in (".metadata", _FACTS)}
            (temporary / _CHECKSUMS).write_text(json.dumps(sums))
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
        torch.distributed.barrier(group)

    return complete


def check(path: Path) -> None:
    """Raises DamagedError unless a folder written by `begin_save` is whole and no byte of it has changed."""
    try:
        sums = json.loads((path / _CHECKSUMS).read_text())
        changed = [name for name, value in sums.items() if _checksum(path / name) != value]
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} is damaged ({error})") from error
    if changed:
        raise DamagedError(f"{path} is damaged: {changed[0]} does not match its checksum")


def facts(path: Path) -> tuple[str, int] | None:
    """(run, nimg) of a folder written by `begin_save`; None if it does not tell."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads((path / _FACTS).read_text())
        return told["run"], told["nimg"]
    return None


def load(path: Path, trainer: Trainer) -> float:
    """Restore what `begin_save` wrote, from any number of processes, in any number; returns the time the run had taken.

    Nothing in the folder is executed (`python_train.dcp_index`). Every process must call this. Raises ValueError if the
    state is of another network or of other averages, UserError if it is something else.
    """
    import torch.distributed.checkpoint as dcp

    from python_train.dcp_index import TensorReader

    reader = TensorReader(path)
    state = _tensors(trainer)
    saved = reader.read_metadata().state_dict_metadata
    for name in [name for name in state if name == _LOSS or name.startswith(_SCALE)]:
        if name not in saved:  # of an earlier version, or of a run with another loss scale
            del state[name]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in a run of one process
            dcp.load(state, storage_reader=reader)
    except dcp.CheckpointException as error:
        raise ValueError(str(next(iter(error.failures.values()))[0])) from error
    trainer.nimg = int(state["nimg"])
    if _LOSS in state:
        trainer.loss_sum.copy_(state[_LOSS] / trainer.world.size)
    _set_counts(trainer, state["nonfinite"])
    with contextlib.suppress(FileNotFoundError):  # an older folder
        tune.load(json.loads((path / _FACTS).read_text()).get("convolutions", {}))
    trainer.refresh()
    return float(state["elapsed"])


def take(state: dict[str, Any], trainer: Trainer) -> None:
    """Give each process its rows of a whole training state, as `Trainer.state_dict` makes it without shards."""
    world, optimizer, averages = trainer.world, trainer.optimizer, trainer.ema
    optimizer.make_state()
    if list(state["ema"]["sigma_rels"]) != averages.sigma_rels:
        raise ValueError(f"the state has averages of {state['ema']['sigma_rels']}, expected {averages.sigma_rels}")

    def copy(into: Tensor, whole: Tensor) -> None:
        if into.dim() > 0:
            parts = whole.chunk(world.size)
            whole = parts[world.rank] if world.rank < len(parts) else whole[:0]
        if whole.shape != into.shape:
            raise ValueError(f"expected a tensor of shape {list(into.shape)}, got {list(whole.shape)}")
        into.copy_(whole)

    for name, buffer in trainer.net.named_buffers():
        buffer.copy_(state["net"][name])
    for i, (name, param) in enumerate(zip(trainer.names, trainer.params, strict=True)):
        adam, saved = optimizer.state[param], state["optimizer"]["state"][i]
        pairs = [(param.detach(), state["net"][name])]
        pairs += [(adam[key], saved[key]) for key in ("exp_avg", "exp_avg_sq", "step")]
        pairs += [
            (ours[i], theirs[i]) for ours, theirs in zip(averages.profiles, state["ema"]["profiles"], strict=True)
        ]
        for into, whole in pairs:
            copy(into, whole)
    _set_counts(trainer, state["nonfinite"])
    trainer.take_loss_scale(state)
    trainer.nimg = state["nimg"]


def _set_counts(trainer: Trainer, counts: Tensor) -> None:
    """Non-finite gradient values of each parameter, over all processes: rank 0 keeps those of shards."""
    if trainer.shards is not None and trainer.world.rank > 0:
        gains = torch.tensor([param.dim() == 0 for param in trainer.params], device=counts.device)
        counts = counts.where(gains, 0)
    trainer.optimizer.nonfinite.copy_(counts)


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value
