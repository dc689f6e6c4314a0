"""The stages of gpu_check.sh: each row is a command with a time limit, printed as it goes; the next runs whatever
becomes of it. Results are merged into benchmarks/results/<date>-<gpu>/ (without a GPU into build/gpu-check):
results.json, and results.md made from it. Rows of one stage share a commit.

Without a GPU, and with --dry-run as if there were none, every row does what a CPU can do of it, in small.

Standard library only: runs before anything is built.
"""

import argparse
import csv
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_results import Outcome, Stage

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu-site"  # the package, installed for this Python
BUILD = ROOT / "build" / "gpu"  # where it was built
BENCH = ROOT / "build" / "gpu-bench"
ROWS = ROOT / "build" / "gpu-rows.json"  # of the last program that wrote some


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
    folders = [os.environ.get(variable, "") for variable in ("CUDA_HOME", "CUDA_PATH")]
    folders += ["/usr/local/cuda", "/usr/local/nvidia"]
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
    if shutil.which("git") is None:
        return os.environ.get("COMMIT", "unknown")
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
        build = ["--target", str(SITE), ".", f"--config-settings=build-dir={BUILD}"]
        options = {"EDM2EXT_WERROR": "OFF", "EDM2EXT_CONV": "ON" if gpu_name() else "AUTO"}
        options |= {"EDM2EXT_CUTLASS": "AUTO"}  # if nvidia-cutlass is installed
        settings = [f"--config-settings=cmake.define.{name}={value}" for name, value in options.items()]
        status, text = run([*pip, *build, *settings], seconds, EDM2EXT_CUDA="ON")
        if status != 0:
            return judged(status, text)
        stamp.write_text(ours)
    status, text = run(python("-m", "edm2ext"), 60, PYTHONPATH=PATHS)
    return judged(status, text, r"CUDA usable: .*")


def installed(seconds: float) -> Outcome:
    """The package that this Python has already."""
    status, text = run(python("-m", "edm2ext"), seconds, PYTHONPATH=PATHS)
    return judged(status, text, r"CUDA usable: .*")


def bench_program(seconds: float) -> Outcome:
    """Of the package's object files."""
    if not (BUILD / "CMakeCache.txt").exists():
        return Outcome("failed", "the package was not built here")
    cmake = [sys.executable, "-m", "cmake"] if _has_module("cmake") else ["cmake"]
    options = ["-DEDM2EXT_BENCHMARKS=ON", f"-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={BENCH}"]
    status, text = run([*cmake, str(BUILD), *options], 120)
    if status == 0:
        status, text = run([*cmake, "--build", str(BUILD), "--target", "edm2_cuda_bench"], seconds)
    return judged(status, text)


def _has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


_NOTHING_RAN = 5  # pytest's status where all tests were skipped


def tests(*arguments: str) -> Callable[[float], Outcome]:
    def work(seconds: float) -> Outcome:
        workers = ["-n", str(min(8, os.cpu_count() or 1))] if _has_module("xdist") else []
        command = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20", *workers, *arguments)
        status, text = run(command, seconds, PYTHONPATH=PATHS)
        outcome = judged(status, text, r"\d+ (?:passed|failed|skipped|error)[^\n]*")
        return Outcome("not measured", outcome.detail) if status == _NOTHING_RAN else outcome

    return work


def sanitizer(tool: str, gpu: str) -> Callable[[float], Outcome]:
    def work(seconds: float) -> Outcome:
        program = find_tool("compute-sanitizer")
        if not gpu:
            return Outcome("not measured", "no GPU")
        if program is None:
            return Outcome("not supported here", "no compute-sanitizer")
        status, text = run([program, "--tool", tool, "--error-exitcode", "9", cuda_bench(), "--small"], seconds)
        refused = re.search(
            r"[^\n]*(not supported|Unable to|permission|Failed to (?:attach|initialize))[^\n]*", text, re.I
        )
        if status != 0 and refused and "ERROR SUMMARY: 0" not in text and "========= Invalid" not in text:
            return Outcome("not supported here", refused[0].strip())
        return judged(status, text, r"(?:ERROR|RACECHECK) SUMMARY[^\n]*")

    return work


# ---- stage b ----


def cuda_bench() -> str:
    """The program that this stage built, or one that `make bench-cpp` built."""
    places = [folder / "edm2_cuda_bench" for folder in (BENCH, ROOT / "build" / "benchmarks")]
    return str(next((place for place in places if place.exists()), places[0]))


def kernel_list(seconds: float) -> Outcome:
    if not Path(cuda_bench()).exists():
        return Outcome("not measured", "edm2_cuda_bench is not built (make bench-cpp)")
    status, text = run([cuda_bench(), "--list"], seconds)
    outcome = judged(status, text)
    outcome.detail = f"{len(text.splitlines())} cases"
    return outcome


def kernel_families() -> list[str]:
    """The first words of the cases."""
    bench = [cuda_bench(), "--list"]
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
        file = ROWS
        file.parent.mkdir(exist_ok=True)
        for family in kernel_families():
            file.unlink(missing_ok=True)
            command = [cuda_bench(), "--filter", family + " ", "--json", str(file)]
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
        file = ROWS
        file.parent.mkdir(exist_ok=True)
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


def measured(
    module: str, arguments: Sequence[str], gpu: str, pattern: str = r"[^\n]*\S[^\n]*(?=\s*\Z)"
) -> Callable[[float], Outcome]:
    """A program of benchmarks/ that takes --json FILE and --dry-run; the rows of the file are the table. `pattern`:
    what of the output tells most."""

    def work(seconds: float) -> Outcome:
        ROWS.parent.mkdir(exist_ok=True)
        ROWS.unlink(missing_ok=True)
        command = python("-m", f"benchmarks.{module}", *arguments, "--json", str(ROWS))
        outcome = judged(*run([*command, *([] if gpu else ["--dry-run"])], seconds, PYTHONPATH=PATHS), pattern)
        found = json.loads(ROWS.read_text()) if ROWS.exists() else []
        outcome.table = found if isinstance(found, list) else found["ops"]
        return outcome if gpu else dry(outcome)

    return work


def dry(outcome: Outcome) -> Outcome:
    """Of a row that ran in small, on the CPU."""
    if outcome.outcome == "passed":
        outcome.outcome, outcome.detail = "not measured", f"no GPU; ran in small on the CPU. {outcome.detail}".strip()
    return outcome


# ---- stage c ----

STEP_BATCHES = {"img512-xs": (8, 32, 128), "img512-s": (8, 32, 128), "img512-m": (8, 32, 128), "img512-xxl": (8, 32)}


def steps(preset: str, batches: Sequence[int], gpu: str, *more: str) -> Callable[[float], Outcome]:
    return measured("gpu_step", [f"--preset={preset}", *(f"--batch={batch}" for batch in batches), *more], gpu)


def beside_plain_torch(reference: Path | None, gpu: str, *more: str) -> Callable[[float], Outcome]:
    """Our step and that of the reference implementation where its folder is given, else of plain torch, in turns."""

    def work(seconds: float) -> Outcome:
        file = ROWS.with_suffix(".csv")
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        command = python("-m", "benchmarks.compare_reference", "--csv", str(file), *more)
        command += [f"--reference={reference}"] if reference else []
        command += ["--preset=img512-s"] if gpu else ["--device=cpu", "--batch=4", "--rounds=1", "--warm-up=1"]
        outcome = judged(*run(command, seconds, PYTHONPATH=PATHS), r"speed-up.*")
        if file.exists():
            with file.open(encoding="utf-8", newline="") as stream:
                outcome.table = list(csv.DictReader(stream))
        return outcome if gpu else dry(outcome)

    return work


# ---- stage d ----


def kernels_of_step(seconds: float) -> Outcome:
    """The other table of the profile that was just made."""
    kernels = json.loads(ROWS.read_text())["kernels"] if ROWS.exists() else []
    return Outcome("passed" if kernels else "not measured", f"{len(kernels)} kernels", table=kernels[:40])


def training(name: str, folder: Path, gpu: str, minutes: float, data: Path | None = None) -> Callable[[float], Outcome]:
    """Curves and samples go to the results' folder."""

    def work(seconds: float) -> Outcome:
        if name == "emoji" and data is None:
            return Outcome("not measured", "no --emoji FILE (python -m python_train.data recipe emoji64)")
        runs = ROOT / "build" / "gpu-training"
        shutil.rmtree(runs, ignore_errors=True)
        least = min(minutes, seconds / 60 - 1)
        command = python("-m", "benchmarks.gpu_training", name, str(runs), f"--minutes={least:.2f}")
        command += [f"--data={data}"] if data else []
        outcome = judged(*run([*command, *([] if gpu else ["--dry-run"])], seconds, PYTHONPATH=PATHS))
        if outcome.outcome == "passed":
            curves = json.loads((runs / f"{name}.json").read_text())["curves"]
            kimgs = list(next(iter(curves.values())))
            chosen = kimgs[:: max(1, len(kimgs) // 10)]
            outcome.table = [{"kimg": k, **{f"loss, {d}": curve.get(k) for d, curve in curves.items()}} for k in chosen]
            folder.mkdir(parents=True, exist_ok=True)
            for picture in runs.glob("*.png"):
                shutil.copy(picture, folder)
        return outcome if gpu else dry(outcome)

    return work


# ---- stage e ----


def convolution_table(gpu: str) -> Callable[[float], Outcome]:
    """Every convolution of EDM2-S with its gradients, the best of all plans, and cuDNN."""

    def work(seconds: float) -> Outcome:
        if not gpu:
            return Outcome("not measured", "no GPU")
        file = ROWS.with_suffix(".csv")
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        status, text = run(python("-m", "benchmarks.conv", "--search", "--csv", str(file)), seconds, PYTHONPATH=PATHS)
        outcome = judged(status, text, r"bound / ours: geometric mean[^\n]*")
        if file.exists():
            with file.open(encoding="utf-8", newline="") as stream:
                outcome.table = list(csv.DictReader(stream))
        return outcome

    return work


Row = tuple[str, Callable[[float], Outcome], float]  # name, work, seconds


def rows_of(options: argparse.Namespace, gpu: str, folder: Path) -> list[Row]:
    prepare: list[Row] = [("library", installed if options.dry_run else library, 400)]
    if options.stage in ("a", "b") and not options.dry_run:
        prepare.append(("edm2_cuda_bench", bench_program, 240))
    if options.stage == "a":
        checks = [
            (f"compute-sanitizer {tool}", sanitizer(tool, gpu), 90) for tool in ("memcheck", "racecheck", "initcheck")
        ]
        gpu_tests: Row = ("GPU tests and golden vectors", tests("tests/gpu", "tests/test_cuda_build.py"), 180)
        everything: Row = ("all tests", tests("tests"), 480)
        return [*prepare, gpu_tests, *checks, *([] if options.dry_run else [everything])]
    if options.stage == "b":
        listing: Row = ("list of kernels", kernel_list, 30)
        return [*prepare, listing, ("kernels", kernel_table(gpu), 150), ("beside torch", torch_table(gpu), 360)]
    if options.stage == "c":
        training_steps = [
            (f"training step, {preset}", steps(preset, batches, gpu), 90) for preset, batches in STEP_BATCHES.items()
        ]
        sampling: Row = ("sampling", steps("img512-s", (8, 32), gpu, "--sampling"), 90)
        beside: list[Row] = [("beside plain torch", beside_plain_torch(options.reference, gpu), 90)]
        drawn = beside_plain_torch(options.reference, gpu, "--sampling", *([] if gpu else ["--evaluations=5"]))
        if gpu:
            graphed, tuned = (
                beside_plain_torch(options.reference, gpu, "--cuda-graph", f"--variant={variant}")
                for variant in ("published", "tuned")
            )
            beside.append(("beside plain torch, CUDA graph", graphed, 90))
            beside.append(("beside plain torch, tuned, CUDA graph", tuned, 180))
        beside.append(("sampling beside plain torch", drawn, 90))
        step_on_cpu = python("-m", "benchmarks.run", "--only", "training step", "--rounds", "3")
        on_cpu: Row = ("training step on the CPU", lambda s: judged(*run(step_on_cpu, s, PYTHONPATH=PATHS)), 90)
        return [*prepare, *training_steps, sampling, *beside, on_cpu]
    if options.stage == "e":
        exact: Row = ("tests of convolutions", tests("tests/gpu/test_gpu_conv.py"), 200)
        return [*prepare, exact, ("convolutions beside cuDNN", convolution_table(gpu), 400)]
    profile = measured("gpu_profile", ["--preset=img512-s", "--batch=32"], gpu, r"the three largest gaps[^\n]*|\Z")
    return [
        *prepare,
        ("profile of a step", profile, 90),
        ("kernels of a step", kernels_of_step, 10),
        ("training, digits", training("digits", folder, gpu, 1.5), 180),
        ("training, emoji64 at 32 x 32", training("emoji", folder, gpu, 3.0, options.emoji), 300),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["a", "b", "c", "d", "e"])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the whole stage")
    parser.add_argument("--results", type=Path, help="folder to merge the results into")
    parser.add_argument("--reference", type=Path, help="stage c: folder of the reference implementation to run beside")
    parser.add_argument("--emoji", type=Path, help="stage d: the emoji, 32 x 32 (python -m python_train.data recipe)")
    parser.add_argument(
        "--dry-run", action="store_true", help="as without a GPU, with the package that is installed; builds nothing"
    )
    options = parser.parse_args()
    gpu = "" if options.dry_run else gpu_name()
    print(gpu or "no GPU: what needs one is not measured", flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", gpu.split(",")[0].lower()).strip("-")
    default = (
        ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{name}" if gpu else ROOT / "build" / "gpu-check"
    )
    folder = options.results or default
    stage = Stage(options.stage, gpu or "no GPU", commit_hash(), options.minutes, folder)
    for row, work, limit in rows_of(options, gpu, folder):
        if options.only in row:
            stage.row(row, work, limit)
    print(f"\nresults are in {folder}", flush=True)
    return 0 if stage.all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
