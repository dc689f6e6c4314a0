"""The directory of a run: its options, log, statistics and training states."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import tqdm

from python_train import UserError, checkpoint, config, sharded_state

STATES_KEPT = 3


class RunDir:
    """The files of one run, and the only writer of them: options, log, statistics.

    Opening checks that the directory is new, or holds this very run: UserError lists the differences otherwise
    (see ``config.FREE_TO_CHANGE`` for what may differ), unless ``override``.
    """

    def __init__(self, path: Path, description: dict[str, Any], override: bool = False) -> None:
        self.path = path
        options_file = path / "options.json"
        self.description = json.loads(json.dumps(description))
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is not a directory")
        if options_file.exists():
            try:
                changed = config.differences(json.loads(options_file.read_text(encoding="utf-8")), self.description)
            except ValueError as error:
                raise UserError(f"{options_file} is damaged ({error})") from error
            if changed and not override:
                raise UserError(
                    f"{path} holds a run with other options:\n  "
                    + "\n  ".join(changed)
                    + "\nChoose another --outdir, repeat the old options, or continue with the new ones by --override."
                )
        elif path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run of this program; choose another --outdir")
        path.mkdir(parents=True, exist_ok=True)
        if not options_file.exists():
            self.write_options()
        self._log = open(path / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - until close()
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._log.close()
            raise UserError(f"another process is training in {path}") from error
        for leftover in (*path.glob(".training-state-*.tmp"), *path.glob(".network-snapshot-*.tmp")):
            _remove(leftover)  # of a process that was killed while writing

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
        """Drop statistics after ``nimg`` (and a half-written line): a resumed run reports them again."""
        path = self.path / "stats.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["Progress/kimg"] * 1000 <= nimg:
                    kept.append(line + "\n")
        checkpoint.write_text(path, "".join(kept))

    def latest_state(self) -> dict[str, Any] | None:
        """The newest training state that is whole; says so when a newer one is damaged. None if there is none."""
        for path in checkpoint.list_states(self.path):
            try:
                if path.is_dir():
                    sharded_state.check(path)
                    state = {"folder": str(path)}
                else:
                    state = checkpoint.load_state(path)
            except UserError as error:
                self.log(f"WARNING: {error}; falling back to the training state before it")
                continue
            self.log(f"resuming from {path}")
            return state
        return None

    def drop_old_states(self) -> None:
        """Keep only the newest training states."""
        for path in checkpoint.list_states(self.path)[STATES_KEPT:]:
            _remove(path)

    def close(self) -> None:
        self._log.close()


def _remove(path: Path) -> None:
    """A file, or a folder of `python_train.sharded_state`."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
