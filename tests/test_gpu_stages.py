"""The stages of benchmarks/gpu_check.sh as far as they run without a GPU: rows, limits, merged results, dry runs."""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import edm2ext
from benchmarks import conv, gpu_bandwidth, gpu_profile, gpu_stages, gpu_step, gpu_training
from benchmarks.gpu_results import Outcome, Stage
from edm2ext.traffic import Traffic


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


def test_tests_that_are_all_skipped_measure_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_stages, "run", lambda *arguments, **options: (5, "1 skipped in 0.1s"))
    assert gpu_stages.tests("tests/gpu")(10) == Outcome("not measured", "1 skipped in 0.1s")


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


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("stage_name", "abcde")
def test_rows_of_a_stage(tmp_path: Path, stage_name: str, dry_run: bool):
    options = argparse.Namespace(stage=stage_name, dry_run=dry_run, reference=None, emoji=None)
    names = [name for name, _, _ in gpu_stages.rows_of(options, "", tmp_path)]
    assert names[0] == "library"
    assert len(names) == len(set(names)) > 2


def test_without_git_the_commit_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("COMMIT", "abc1234")
    assert gpu_stages.commit_hash() == "abc1234"


def test_the_bench_program_is_made_where_the_package_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_stages, "BUILD", tmp_path)
    assert gpu_stages.bench_program(10) == Outcome("failed", "the package was not built here")
    (tmp_path / "CMakeCache.txt").touch()
    commands: list[list[str]] = []

    def run(command: list[str], seconds: float) -> tuple[int, str]:
        commands.append(command)
        return 0, "made"

    monkeypatch.setattr(gpu_stages, "run", run)
    assert gpu_stages.bench_program(10) == Outcome("passed", "made")
    assert all(str(tmp_path) in command for command in commands)
    assert commands[-1][-2:] == ["--target", "edm2_cuda_bench"]


def test_rows_of_convolutions_are_kept_as_they_come(tmp_path: Path):
    file = tmp_path / "rows.csv"
    for count in (1, 2):
        conv.save(file, [{"problem": f"p{i}", "ours ms": "0.1"} for i in range(count)])
        assert file.read_text().splitlines() == ["problem,ours ms", *(f"p{i},0.1" for i in range(count))]


def test_a_row_that_ran_in_small_is_not_measured():
    assert gpu_stages.dry(Outcome("passed", "fine")).outcome == "not measured"
    assert gpu_stages.dry(Outcome("failed", "broken")) == Outcome("failed", "broken")


@pytest.mark.parametrize("sampling", [[], ["--sampling"]], ids=["training", "sampling"])
def test_a_step_and_sampling_without_a_gpu(tmp_path: Path, sampling: list[str]):
    file = tmp_path / "rows.json"
    result = CliRunner().invoke(gpu_step.main, ["--dry-run", "--json", str(file), *sampling])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(file.read_text())
    assert "digits" in row["work"]
    assert row["ms"] is row["mfu"] is row["peak_gib"] is None


@pytest.mark.skipif(not edm2ext.build_info()["cuda_compiled"], reason="the library holds no CUDA kernels")
def test_a_profile_without_a_gpu(tmp_path: Path):
    file = tmp_path / "rows.json"
    result = CliRunner().invoke(gpu_profile.main, ["--dry-run", "--json", str(file)])
    assert result.exit_code == 0, result.output
    ops = {row["op"]: row for row in json.loads(file.read_text())["ops"]}
    assert ops["mp_sum"]["calls"] == ops["mp_sum"]["launches"] > 0
    assert ops["convolution"]["gflop"] > 0


def test_gaps_between_time_and_floor():
    """An op that another op of the table made is not counted twice."""

    def event(name: str, micros: float, parent: "SimpleNamespace | None" = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_time_total=micros, cpu_parent=parent)

    whole = event("aten::_to_copy", 5000.0, event("aten::to", 5000.0))
    events = [event("edm2::mp_sum", 3000.0), whole, event("aten::copy_", 5000.0, whole), event("aten::mm", 8000.0)]
    counted = {"mp_sum": Traffic(1, 10, 10), "_to_copy": Traffic(1, 5, 5), "copy_": Traffic(1, 1, 1), "mm": Traffic(1)}
    rows = {row.op: row for row in gpu_profile.ops_table(events, counted, {"mm": 700}, 1, (100.0, 10.0))}
    assert {op: row.ms for op, row in rows.items()} == {"mp_sum": 3.0, "_to_copy": 5.0, "copy_": 0.0, "mm": 8.0}
    assert {op: row.floor_ms for op, row in rows.items()} == {"mp_sum": 2.0, "_to_copy": 1.0, "copy_": 0.2, "mm": 7.0}
    assert next(iter(rows)) == "_to_copy"


def test_two_loss_curves_are_compared_where_both_have_points():
    curves = {"cuda": {1.0: 1.0, 2.0: 0.5, 3.0: 0.4}, "cpu": {1.0: 1.0, 2.0: 0.55}}
    found = gpu_training.compare(curves)
    assert found["common_points"] == 2
    assert found["largest_difference"] == pytest.approx(0.1)
    assert gpu_training.compare({"cpu": {1.0: 1.0}}) == {"common_points": 0, "largest_difference": None}
