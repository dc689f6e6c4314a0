"""The directory of a run: its options, log, statistics and training states."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import uuid
import weakref
from pathlib import Path
from typing import Any

import tqdm

from python_train import UserError, checkpoint, config, sharded_state

_ATOMIC = r"options\.json|stats\.jsonl|training-state-\d+\.(pt|dcp)|(network-snapshot|samples)-.*"
_LEFTOVER = re.compile(rf"\.({_ATOMIC})(\.\d+)?\.tmp")


class RunDir:
    """The files of one run, and the only writer of them: options, log, statistics.

    Opening locks the directory and checks that it is new, or holds this very run: UserError lists the differences
    otherwise (see ``config.FREE_TO_CHANGE`` for what may differ), unless ``override``; ``changed`` holds them then.
    ``name`` is a word that tells this run from every other one.
    """

    def __init__(self, path: Path, description: dict[str, Any], override: bool = False) -> None:
        self.path = path
        self.description = json.loads(json.dumps(description))
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is not a directory")
        options_file = path / "options.json"
        if path.is_dir() and not options_file.exists() and not all(_before_options(name) for name in os.listdir(path)):
            raise UserError(f"{path} is not empty and holds no run of this program; choose another --outdir")
        path.mkdir(parents=True, exist_ok=True)
        self._log = open(path / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - until close()
        self._lock = os.open(path / "log.txt", os.O_RDONLY)
        _open_directories.add(self)
        try:
            self._take_lock()
            stored = self._stored_options(options_file) if options_file.exists() else self.description
            self.changed = config.differences(stored, self.description)
            if self.changed and not override:
                raise UserError(
                    f"{path} holds a run with other options:\n  "
                    + "\n  ".join(self.changed)
                    + "\nChoose another --outdir, repeat the old options, or continue with the new ones by --override."
                )
        except UserError:
            self.close()
            raise
        self.name = self.description["run"] = stored.get("run") or uuid.uuid4().hex
        if not options_file.exists():
            self.write_options()
        for name in os.listdir(path):
            if _LEFTOVER.fullmatch(name):
                remove(path / name)  # of a process that was killed while writing

    def _stored_options(self, path: Path) -> dict[str, Any]:
        """What options.json says, with the defaults of options that are younger than the file."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            defaults = config.TrainOptions().to_json()
            younger = self.description["options"].keys() - stored["options"].keys()
            stored["options"] |= {name: defaults[name] for name in younger & defaults.keys()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error})") from error
        checkpoint.require_known(path, stored.get("format_version", 1))
        return stored

    def _take_lock(self) -> None:
        """Held until the file is closed or the process is gone, whatever ends it: there are no stale locks."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is training in {self.path}") from error

    def forget_lock(self) -> None:
        """In a forked process: leave the lock to the process that took it."""
        os.close(self._lock)

    def write_options(self) -> None:
        """Write options.json, from here on what a later run is compared with."""
        checkpoint.write_text(self.path / "options.json", json.dumps(self.description, indent=2) + "\n")

    def log(self, text: str) -> None:
        """Append a line to log.txt and print it."""
        tqdm.tqdm.write(text)
        self._log.write(text + "\n")

    def append_stats(self, stats: dict[str, float]) -> None:
        """Append one JSON object to stats.jsonl."""
        with open(self.path / "stats.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(stats) + "\n")

    def trim_stats(self, nimg: int) -> None:
        """Drop statistics after ``nimg`` (and a half-written line): a resumed run reports them again, and one that
        begins at 0 those of 0, too."""
        path = self.path / "stats.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["Progress/kimg"] * 1000 <= nimg > 0:
                    kept.append(line + "\n")
        checkpoint.write_text(path, "".join(kept))

    def latest_state(self) -> dict[str, Any] | None:
        """The newest training state that is whole; says so when a newer one is damaged. None if there is none at all.

        Raises UserError if there are some and none is whole, or the newest is of a format not known here.
        """
        paths = checkpoint.list_states(self.path)
        for path in paths:
            try:
                if path.is_dir():
                    sharded_state.check(path)
                    state = {"folder": str(path)}
                else:
                    state = checkpoint.load_state(path)
            except checkpoint.DamagedError as error:
                self.log(f"WARNING: {error}; falling back to the training state before it")
                continue
            self.log(f"resuming from {path}")
            return state
        if paths:
            raise UserError(f"no training state in {self.path} can be read; without any, the run starts from its "
                            "beginning: move them away if that is what you want")  # fmt: skip
        return None

    def close(self) -> None:
        _open_directories.discard(self)
        os.close(self._lock)
        self._log.close()


def remove(path: Path) -> None:
    """A file, or a folder of `python_train.sharded_state`."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _before_options(name: str) -> bool:
    """Whether a file may be there before options.json is: a process may have been killed in between."""
    return name == "log.txt" or _LEFTOVER.fullmatch(name) is not None


# A lock belongs to all processes that share its file: those that read ahead would keep it when this one is killed.
_open_directories: weakref.WeakSet[RunDir] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [directory.forget_lock() for directory in _open_directories])
