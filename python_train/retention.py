"""Which training states of a run are kept."""

from __future__ import annotations

from pathlib import Path

from python_train import checkpoint, sharded_state
from python_train.run_dir import remove


def drop_old_states(run_dir: Path, run: str, nimg: int, keep: int, keep_every: int) -> None:
    """Delete the training states of run ``run`` but its last ``keep`` (0 = keep all) and those at multiples of
    ``keep_every`` images (0 = none).

    States beyond ``nimg`` images, of a run that fell back to an earlier one, are neither counted nor deleted; nor is
    any file that this run has not written, whatever its name.
    """
    if not keep:
        return
    found = [(_facts(path), path) for path in checkpoint.list_states(run_dir)]
    own = sorted(((fact[1], path) for fact, path in found if fact and fact[0] == run and fact[1] <= nimg), reverse=True)
    for state_nimg, path in own[keep:]:
        if not keep_every or state_nimg % keep_every:
            if path.is_dir():  # under a name that no training state has: a part of a folder is none
                path = path.rename(path.with_name(f".{path.name}.tmp"))
            remove(path)


def _facts(path: Path) -> tuple[str, int] | None:
    """(run, nimg) of a training state; None if it does not tell."""
    return sharded_state.facts(path) if path.is_dir() else checkpoint.state_facts(path)
