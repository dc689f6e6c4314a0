"""What became of the rows of gpu_check.sh's stages, merged into results.json and results.md by commit.

Standard library only: runs before anything is built.
"""

import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Outcome:
    """Of one row: "passed", "failed", "not supported here" or "not measured"; a sentence; and what was measured."""

    outcome: str
    detail: str = ""
    seconds: float = 0.0
    table: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Stage:
    """Runs rows until the time is up, and keeps what became of them."""

    def __init__(self, name: str, gpu: str, commit: str, minutes: float, folder: Path) -> None:
        self.name = name
        self.gpu = gpu
        self.commit = commit
        self.deadline = time.monotonic() + 60 * minutes
        self.folder = folder
        self.all_passed = True

    def row(self, name: str, work: Callable[[float], Outcome], limit: float) -> Outcome:
        """Runs work(seconds it may take) and saves the outcome."""
        seconds = min(limit, self.deadline - time.monotonic())
        print(f"\n==== {self.name}: {name}", flush=True)
        started = time.monotonic()
        try:
            outcome = work(seconds) if seconds > 5 else Outcome("not measured", "out of time")
        except Exception as error:
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        outcome.seconds = round(time.monotonic() - started, 1)
        print(f"---- {name}: {outcome.outcome} ({outcome.seconds} s) {outcome.detail}", flush=True)
        self.all_passed &= outcome.outcome != "failed"
        self._save(name, outcome)
        return outcome

    def _save(self, name: str, outcome: Outcome) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "results.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        stage = found.get(self.name, {})
        if stage.get("commit") != self.commit:
            stage = {"commit": self.commit, "rows": {}}
        stage["rows"][name] = {"when": _now(), **dataclasses.asdict(outcome)}
        found.update({"gpu": self.gpu, self.name: stage})
        _write(file, json.dumps(found, indent=1) + "\n")
        _write(self.folder / "results.md", markdown(found))


def _write(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def markdown(found: dict[str, Any]) -> str:
    """All stages as tables."""
    lines = [f"# {found['gpu']}", ""]
    for name in sorted(key for key in found if key != "gpu"):
        stage = found[name]
        lines += [
            f"## Stage {name}, commit {stage['commit']}",
            "",
            "| row | outcome | seconds | |",
            "|---|---|---:|---|",
        ]
        for row, outcome in stage["rows"].items():
            detail = outcome["detail"].replace("|", "/").replace("\n", " ")
            lines.append(f"| {row} | {outcome['outcome']} | {outcome['seconds']} | {detail} |")
        for row, outcome in stage["rows"].items():
            if outcome["table"]:
                columns = list(dict.fromkeys(key for entry in outcome["table"] for key in entry))
                lines += ["", f"### {row}", "", f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
                lines += [
                    "| " + " | ".join(_cell(entry.get(key)) for key in columns) + " |" for entry in outcome["table"]
                ]
        lines.append("")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
