"""The stages of benchmarks/gpu_check.sh as far as they run without a GPU: rows, limits, merged results, dry runs."""

import json
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import gpu_bandwidth, gpu_stages
from benchmarks.gpu_stages import Outcome, Stage


def stage(folder: Path, commit: str = "abc", minutes: float = 1.0) -> Stage:
    return Stage("b", "a GPU", commit, minutes, folder)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["b"]


def test_rows_survive_each_other_and_are_kept(tmp_path: Path):
    first = stage(tmp_path)

    def breaks(seconds: float) -> Outcome:
        raise OSError("gone")

    first.row("one", breaks, 10)
    first.row("two", lambda seconds: Outcome("passed", "fine", table=[{"kernel": "k", "ms": 1.5, "of copy": None}]), 10)
    assert not first.all_passed
    rows = results(tmp_path)["rows"]
    assert (rows["one"]["outcome"], rows["one"]["detail"]) == ("failed", "OSError: gone")
    text = (tmp_path / "results.md").read_text()
    assert "| two | passed |" in text
    assert "| k | 1.5 | not measured |" in text


def test_rows_of_one_stage_share_a_commit(tmp_path: Path):
    for commit, row in (("abc", "one"), ("abc", "two"), ("def", "two")):
        stage(tmp_path, commit).row(row, lambda seconds: Outcome("passed"), 10)
    assert results(tmp_path)["commit"] == "def"
    assert list(results(tmp_path)["rows"]) == ["two"]


def test_no_row_starts_after_the_time(tmp_path: Path):
    late = stage(tmp_path, minutes=0)
    assert late.row("one", lambda seconds: pytest.fail("started"), 10).detail == "out of time"


def test_a_command_is_ended_at_its_limit(capfd: pytest.CaptureFixture[str]):
    started = time.monotonic()
    status, text = gpu_stages.run([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], 3)
    assert time.monotonic() - started < 30
    assert (status, text) == (-1, "1\n")
    assert gpu_stages.judged(status, text).outcome == "failed"


def test_what_a_command_said():
    assert gpu_stages.judged(0, "a\nlast line\n\n") == Outcome("passed", "last line")
    pattern = r"\d+ (?:passed|failed)[^\n]*"
    assert gpu_stages.judged(1, "x\n1 failed, 2 passed in 3 s\n", pattern) == Outcome(
        "failed", "1 failed, 2 passed in 3 s"
    )


def test_every_case_beside_torch_has_its_rows_without_a_gpu(tmp_path: Path):
    file = tmp_path / "rows.json"
    arguments = ["--dry-run", "--only", "NCHW, float32", "--json", str(file)]
    result = CliRunner().invoke(gpu_bandwidth.main, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert {"pixel_norm, NCHW, float32, forward", "mp_cat + mp_silu, NCHW, float32, backward"} <= {
        r["name"] for r in rows
    }
    assert not [row for row in rows if "failed" in row["note"]]
