"""The stages of gpu_check.sh: each row is a command with a time limit, printed as it goes; the next runs whatever
becomes of it. Results are merged into benchmarks/results/<date>-<gpu>/ (without a GPU into build/gpu-check):
results.json, and results.md made from it. Rows of one stage share a commit.

Standard library only: runs before anything is built.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-site"  # the package, installed for this Python
BENCH = ROOT / "build" / "gpu-bench"
NO_GPU = "not measured: no GPU"


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


# ---- commands ----


def run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit status (-1: the time was up) and what it printed, which also goes to stdout."""
    print("$ " + " ".join(command), flush=True)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    lines = []
    with process:
        for line in process.stdout or ():
            lines.append(line)
            print(line, end="", flush=True)
    timer.cancel()
    return -1 if late.is_set() else process.returncode, "".join(lines)


def python(*arguments: str) -> list[str]:
    # -P: the package of the checkout, which holds no library, must not be found first.
    return [sys.executable, "-P", *arguments]


PATHS = os.pathsep.join(map(str, (SITE, ROOT)))


def judged(status: int, text: str, pattern: str = r"[^\n]*\S[^\n]*(?=\s*\Z)") -> Outcome:
    """Passed if the status is 0; the detail is the last line that fits the pattern."""
    found = re.findall(pattern, text)
    detail = found[-1].strip() if found else ""
    if status == -1:
        return Outcome("failed", f"out of time; {detail}")
    return Outcome("passed" if status == 0 else "failed", detail)


def find_tool(name: str) -> str | None:
    folders = [os.environ.get(variable, "") for variable in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [shutil.which(name), *(shutil.which(str(Path(folder) / "bin" / name)) for folder in folders if folder)]
    return next((place for place in places if place), None)


def gpu_name() -> str:
    tool = find_tool("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def commit_hash() -> str:
    """Of the checkout, or what COMMIT says where there is no git."""
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return os.environ.get("COMMIT", "unknown")
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    lines = [line for line in changed.splitlines() if "benchmarks/results/" not in line]
    return done.stdout.strip() + ("-dirty" if lines else "")


# ---- stage a ----


def sources_hash() -> str:
    files = [
        ROOT / "CMakeLists.txt",
        *(f for part in ("csrc", "cmake") for f in (ROOT / part).rglob("*") if f.is_file()),
    ]
    packages = [f for part in ("edm2ext", "python_train") for f in (ROOT / part).rglob("*.py")]
    digest = hashlib.sha256()
    for file in sorted([*files, *packages]):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


def library(seconds: float) -> Outcome:
    """What is built already, if it is of these sources and loads; else a new build."""
    stamp = SITE / "sources"
    ours = sources_hash()
    loads = python("-c", "import edm2ext, sys; sys.exit(not edm2ext.build_info()['cuda_compiled'])")
    if not (stamp.exists() and stamp.read_text() == ours and run(loads, 60, PYTHONPATH=PATHS)[0] == 0):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--upgrade"]
        build = ["--target", str(SITE), ".", f"--config-settings=build-dir={ROOT / 'build' / 'gpu'}"]
        status, text = run([*pip, *build], seconds, EDM2EXT_CUDA="ON")
        if status != 0:
            return judged(status, text)
        stamp.write_text(ours)
    status, text = run(python("-m", "edm2ext"), 60, PYTHONPATH=PATHS)
    return judged(status, text, r"CUDA usable: .*")


def bench_program(seconds: float) -> Outcome:
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    cmake = [sys.executable, "-m", "cmake"] if _has_module("cmake") else ["cmake"]
    ninja = [f"-DCMAKE_MAKE_PROGRAM={_ninja()}"] if _ninja() else []
    configure = [
        "-S",
        ".",
        "-B",
        str(BENCH),
        "-G",
        "Ninja",
        *ninja,
        *options,
        "-DEDM2EXT_CUDA=ON",
        "-DEDM2EXT_BENCHMARKS=ON",
    ]
    status, text = run([*cmake, *configure], 120)
    if status == 0:
        status, text = run([*cmake, "--build", str(BENCH), "--target", "edm2_cuda_bench"], seconds)
    return judged(status, text)


def _has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def _ninja() -> str | None:
    return shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def tests(*arguments: str) -> Callable[[float], Outcome]:
    def work(seconds: float) -> Outcome:
        workers = ["-n", str(min(8, os.cpu_count() or 1))] if _has_module("xdist") and "tests" in arguments else []
        command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20", *workers, *arguments)
        return judged(*run(command, seconds, PYTHONPATH=PATHS), r"\d+ (?:passed|failed|skipped|error)[^\n]*")

    return work


def sanitizer(tool: str, gpu: str) -> Callable[[float], Outcome]:
    def work(seconds: float) -> Outcome:
        program = find_tool("compute-sanitizer")
        if not gpu:
            return Outcome("not measured", "no GPU")
        if program is None:
            return Outcome("not supported here", "no compute-sanitizer")
        bench = str(BENCH / "edm2_cuda_bench")
        status, text = run([program, "--tool", tool, "--error-exitcode", "9", bench, "--small"], seconds)
        refused = re.search(
            r"[^\n]*(not supported|Unable to|permission|Failed to (?:attach|initialize))[^\n]*", text, re.I
        )
        if status != 0 and refused and "ERROR SUMMARY: 0" not in text and "========= Invalid" not in text:
            return Outcome("not supported here", refused[0].strip())
        return judged(status, text, r"(?:ERROR|RACECHECK) SUMMARY[^\n]*")

    return work


# ---- stage b ----


def kernel_list(seconds: float) -> Outcome:
    status, text = run([str(BENCH / "edm2_cuda_bench"), "--list"], seconds)
    outcome = judged(status, text)
    outcome.detail = f"{len(text.splitlines())} cases"
    return outcome


def kernel_families() -> list[str]:
    """The first words of the cases."""
    bench = [str(BENCH / "edm2_cuda_bench"), "--list"]
    text = subprocess.run(bench, capture_output=True, text=True, check=False).stdout
    return list(dict.fromkeys(line.split()[0] for line in text.splitlines()))


def kernel_table(gpu: str) -> Callable[[float], Outcome]:
    """Each family in a process of its own: a kernel that goes astray takes only its family with it."""

    def work(seconds: float) -> Outcome:
        if not gpu:
            return Outcome("not measured", "no GPU")
        end = time.monotonic() + seconds
        table: list[dict[str, Any]] = []
        failed = []
        file = BENCH / "rows.json"
        for family in kernel_families():
            file.unlink(missing_ok=True)
            command = [str(BENCH / "edm2_cuda_bench"), "--filter", family + " ", "--json", str(file)]
            status, _ = run(command, max(5.0, min(60.0, end - time.monotonic())))
            if file.exists():
                found = json.loads(file.read_text())
                table += [{"kernel": row.pop("name"), **row} for row in found["rows"]]
            if status != 0:
                failed.append(family)
        return Outcome("failed" if failed else "passed", " ".join(failed) and f"failed: {' '.join(failed)}", 0, table)

    return work


def torch_table(gpu: str) -> Callable[[float], Outcome]:
    def work(seconds: float) -> Outcome:
        file = BENCH / "torch.json"
        file.unlink(missing_ok=True)
        command = python(
            "-m", "benchmarks.gpu_bandwidth", "--json", str(file), "--minutes", f"{(seconds - 30) / 60:.2f}"
        )
        status, text = run([*command, *([] if gpu else ["--dry-run"])], seconds, PYTHONPATH=PATHS)
        outcome = judged(status, text)
        found = json.loads(file.read_text()) if file.exists() else {"rows": []}
        copy = found.get("copy_bytes_per_ms")
        for row in found["rows"]:
            rate = row["bytes"] / row["native"] if row["native"] else None
            outcome.table.append(
                {
                    "op": row["name"],
                    "launches": row["launches"],
                    "MB": round(row["bytes"] / 1e6),
                    "ms": row["native"],
                    "TB/s": rate and rate / 1e9,
                    "of copy": rate and copy and rate / copy,
                    "plain torch, ms": row["plain"],
                    "torch.compile, ms": row["compiled"],
                    "note": row["note"],
                }
            )
        if not gpu and outcome.outcome == "passed":
            outcome.outcome, outcome.detail = "not measured", "no GPU; every case ran on the CPU"
        else:
            outcome.detail = f"device copy {copy / 1e9:.2f} TB/s" if copy else outcome.detail
        return outcome

    return work


Row = tuple[str, Callable[[float], Outcome], float]  # name, work, seconds


def rows_of(stage: str, gpu: str) -> list[Row]:
    prepare: list[Row] = [("library", library, 400), ("edm2_cuda_bench", bench_program, 240)]
    if stage == "a":
        checks = [
            (f"compute-sanitizer {tool}", sanitizer(tool, gpu), 90) for tool in ("memcheck", "racecheck", "initcheck")
        ]
        gpu_tests: Row = ("GPU tests and golden vectors", tests("tests/gpu", "tests/test_cuda_build.py"), 180)
        return [*prepare, gpu_tests, *checks, ("all tests", tests("tests"), 480)]
    listing: Row = ("list of kernels", kernel_list, 30)
    return [*prepare, listing, ("kernels", kernel_table(gpu), 150), ("beside torch", torch_table(gpu), 360)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["a", "b"])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole stage")
    parser.add_argument("--results", type=Path, help="folder to merge the results into")
    options = parser.parse_args()
    gpu = gpu_name()
    print(gpu or "no GPU: what needs one is not measured", flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", gpu.split(",")[0].lower()).strip("-")
    default = (
        ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{name}" if gpu else ROOT / "build" / "gpu-check"
    )
    folder = options.results or default
    stage = Stage(options.stage, gpu or "no GPU", commit_hash(), options.minutes, folder)
    for row, work, limit in rows_of(options.stage, gpu):
        if options.only in row:
            stage.row(row, work, limit)
    print(f"\nresults are in {folder}", flush=True)
    return 0 if stage.all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
