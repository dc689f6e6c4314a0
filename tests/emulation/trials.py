"""What becomes of a fault: a copy of the sources with it is compiled and the emulated tests run, in a child process."""

import dataclasses
import functools
import importlib
import os
import pickle
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from seeding import Mutant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDERS = ("cuda", "include", "torch")  # of csrc, that the emulation compiles
LAUNCH = "csrc/cuda/launch.h"
PATIENCE = 10  # a test that takes so many times as long as the slowest without a fault loops for ever


def families(root: Path) -> dict[str, set[str]]:
    """{name: files of csrc/cuda that it is made of} for every tests/emulation/<name>.cpp that has a test file."""
    found = {}
    for source in sorted(HERE.glob("*.cpp")):
        if source.stem != "bindings" and (HERE / f"test_emulated_{source.stem}.py").exists():
            found[source.stem] = {str(f.relative_to(root)) for f in _included(source, root) if f.is_relative_to(root)}
    return found


def _included(source: Path, root: Path) -> set[Path]:
    found: set[Path] = set()
    left = [source]
    while left:
        file = left.pop()
        for name in re.findall(r'^#include "([^"]+)"', file.read_text(), re.MULTILINE):
            places = [folder / name for folder in (file.parent, root / "csrc", root / "csrc" / "include")]
            place = next((p.resolve() for p in places if p.exists()), None)
            if place is not None and place not in found:
                found.add(place)
                left.append(place)
    return found


@dataclasses.dataclass
class Verdict:
    """`outcome`: killed, survived, same (object code), stillborn (does not compile), untried (unnoticeable); `by`: what
    noticed, and where; `seconds` of processor time it took."""

    outcome: str
    by: str = ""
    seconds: float = 0.0


def in_child(function: Callable[[], object], log: Path) -> tuple[int, str]:
    """Runs function in a forked process; returns its exit status (99 after an exception, a signal as negative) and what
    it returned as a string, or the exception. What it prints goes to the log."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with log.open("ab") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        _answer(write, lambda: str(function()).encode())
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), answer


def _answer(pipe: int, function: Callable[[], bytes]) -> NoReturn:
    """Ends this process; what the function returns goes down the pipe, or its exception."""
    status = 99
    try:
        answer = function()
        status = 0
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"[:4000].encode()
    with os.fdopen(pipe, "wb") as sink:
        sink.write(answer)
    os._exit(status)


class _Plugin:
    """Of pytest: tests that found faults before come first; which one finds this fault; a time limit for each."""

    def __init__(self, first: Sequence[str], seconds: float) -> None:
        self.order = {name: i for i, name in enumerate(first)}
        self.seconds = seconds
        self.slowest = self.started = 0.0
        self.failed = ""

    def pytest_runtest_logstart(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self.seconds)  # of processor time; then a signal ends the process
        self.started = time.process_time()

    def pytest_runtest_logfinish(self) -> None:
        self.slowest = max(self.slowest, time.process_time() - self.started)

    def pytest_collection_modifyitems(self, items: list) -> None:
        items.sort(key=lambda item: self.order.get(item.nodeid.split("/")[-1], len(self.order)))

    def pytest_runtest_logreport(self, report: object) -> None:
        if report.failed and not self.failed:  # type: ignore[attr-defined]
            self.failed = report.nodeid.split("/")[-1]  # type: ignore[attr-defined]


def _emulated(root: Path, build: Path) -> Any:
    """The module that compiles and loads kernels, set to a copy of the sources and to a folder for what it builds."""
    os.environ.update(EDM2EXT_EMULATED_SOURCES=str(root), EDM2EXT_EMULATION_BUILD=str(build))
    sys.path.insert(0, str(HERE))
    import emulated

    flags = [flag for flag in emulated._FLAGS if not flag.startswith(("-W", "-g"))]
    emulated._FLAGS[:] = [*flags, "-w", "-g0", f"-ffile-prefix-map={root}=.", "-include", str(_prelude(root))]
    return emulated


def _prelude(root: Path) -> Path:
    """Of a copy of the sources: includes the headers that no fault is seeded in; all copies have it compiled."""
    return root.parents[1] / "prelude.h"


def precompile(root: Path, build: Path) -> None:
    """Makes the prelude: the headers of C++ and of the emulated toolkit that the kernels include."""
    texts = [(root / name).read_text() for name in set().union(*families(root).values())]
    names = sorted({name for text in texts for name in re.findall(r"^#include (<.*>)$", text, re.MULTILINE)})
    prelude = _prelude(root)
    prelude.write_text("".join(f"#include {name}\n" for name in names))
    emulated = _emulated(root, build)
    flags = [*emulated._FLAGS[:-2], *emulated._CHECKS, f"-I{HERE / 'include'}"]
    subprocess.run(["g++", *flags, "-x", "c++-header", str(prelude), "-o", f"{prelude}.gch"], check=True)


_NOT_COMPILED = 999
_HALVES = re.compile(r"(case DType::kFloat16:\n)(.*)(case DType::kBFloat16:\n)(.*)(?=default:)", re.DOTALL)


def for_float32(launch: str) -> str:
    """launch.h, so that families that take their kernels from dispatch_storage compile those for float32 alone."""
    changed, count = _HALVES.subn(rf"\1\3 return static_cast<cudaError_t>({_NOT_COMPILED});\n", launch)
    assert count == 1
    return changed


def _skip_what_is_not_compiled(emulated: Any) -> None:
    """Ends a test where it needs another dtype than for_float32 left."""
    import pytest

    call = emulated.Library.call

    def call_or_skip(library: object, function: str, *arguments: object) -> None:
        try:
            call(library, function, *arguments)
        except emulated.KernelFault as fault:
            if f" error {_NOT_COMPILED}:" in str(fault):
                pytest.skip("for float32 alone")
            raise

    emulated.Library.call = call_or_skip


def compile_family(family: str, root: Path, build: Path) -> bytes:
    """The object code of a family."""
    return _emulated(root, build)._object(family, root).read_bytes()


def run_tests(family: str, root: Path, build: Path, first: Sequence[str], seconds: float) -> str:
    """The test that failed, or an empty string; and the processor time of the slowest. Each has so many seconds."""
    _skip_what_is_not_compiled(_emulated(root, build))
    import pytest

    plugin = _Plugin(first, seconds)
    os.chdir(HERE)
    command = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no", f"test_emulated_{family}.py"]
    code = pytest.main(command, plugins=[plugin])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest: {code!r}")
    return f"{plugin.failed}\n{plugin.slowest}"


def copy_sources(root: Path, target: Path) -> None:
    for part in FOLDERS:
        shutil.copytree(root / "csrc" / part, target / "csrc" / part)


class Tree:
    """The copy of the sources and the folder of objects that one mutant at a time is tried in."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "sources"
        self.build = folder / "build"
        self.originals = folder / "originals"
        self.log = folder / "log"
        self.build.mkdir(parents=True)
        self.originals.mkdir()
        copy_sources(ROOT, self.root)

    def write(self, file: str, text: str, only_float32: bool) -> None:
        """Changes a file of the copy, and whether there are kernels for other dtypes than float32."""
        for name in {file, LAUNCH}:
            now = text if name == file else (ROOT / name).read_text()
            (self.root / name).write_text(for_float32(now) if name == LAUNCH and only_float32 else now)

    def objects(self, family: str) -> "tuple[int, str, bytes]":
        file = self.build / "object"
        status, answer = in_child(lambda: file.write_bytes(compile_family(family, self.root, self.build)), self.log)
        code = file.read_bytes() if status == 0 else b""
        return status, answer, code.replace(str(self.root).encode(), b".")  # the sanitizer's messages name the file

    def original_code(self, family: str, only_float32: bool) -> bytes:
        """The family's object code without a fault, of which the sources must be free; compiled once."""
        file = self.originals / f"{family}-{only_float32}"
        if not file.exists():
            self.write(LAUNCH, (ROOT / LAUNCH).read_text(), only_float32)
            status, answer, code = self.objects(family)
            if status != 0:
                raise RuntimeError(f"{family} does not compile: {answer}")
            file.write_bytes(code)
        return file.read_bytes()

    def test(self, family: str, first: Sequence[str], seconds: float) -> "tuple[Verdict, float]":
        """The verdict, and the seconds that the slowest test took."""
        status, answer = in_child(lambda: run_tests(family, self.root, self.build, first, seconds), self.log)
        if status == 99:
            raise RuntimeError(f"{family}: {answer}\n{self.log.read_text(errors='replace')[-3000:]}")
        if status < 0:
            return Verdict("killed", "never ends" if status == -signal.SIGPROF else f"signal {-status}"), seconds
        failed, slowest = answer.split("\n")
        return Verdict("killed", failed) if failed else Verdict("survived"), float(slowest)

    def clean(self) -> None:
        for file in self.build.iterdir():
            if not file.name.startswith("emulator-"):
                file.unlink()
        self.log.unlink(missing_ok=True)


def stages(family: str) -> list[bool]:
    """Whether to compile for float32 alone: first so, then not, where that makes a difference.

    Most faults are noticed in float32, and kernels for it alone compile several times as fast."""
    names = families(ROOT)[family] - {LAUNCH}
    return [True, False] if any("dispatch_storage(" in (ROOT / name).read_text() for name in names) else [False]


def time_limit(family: str, tree: Tree) -> float:
    """Seconds for each of the family's tests. Raises RuntimeError unless it passes them without a fault."""
    slowest = 0.0
    for only_float32 in stages(family):
        tree.original_code(family, only_float32)
        verdict, slowest = tree.test(family, [], 600)
        tree.clean()
        if verdict.outcome == "killed":
            raise RuntimeError(f"{family}: its tests fail without a fault: {verdict.by}")
    return 1 + PATIENCE * slowest


def judge(
    mutant: Mutant, tree: Tree, reached: Sequence[str], limits: dict[str, float], first: Sequence[str]
) -> Verdict:
    """Tries a mutant on the families it reaches until one notices, its own first, then those that last found faults."""
    started = sum(os.times()[:4])
    order = {name.split("::")[0]: i for i, name in reversed(list(enumerate(first)))}
    places = {family: order.get(f"test_emulated_{family}.py", len(order)) for family in reached}
    in_turn = sorted(reached, key=lambda name: (name != Path(mutant.file).stem, places[name]))
    verdict = Verdict("same")
    for family, only_float32 in [(name, stage) for name in in_turn for stage in stages(name)]:
        now = _judge_build(mutant, family, only_float32, tree, limits[family], first)
        verdict = verdict if now.outcome == "same" else now
        if verdict.outcome in ("killed", "stillborn"):
            break
    return dataclasses.replace(verdict, seconds=sum(os.times()[:4]) - started)


def _judge_build(
    mutant: Mutant, family: str, only_float32: bool, tree: Tree, limit: float, first: Sequence[str]
) -> Verdict:
    text = (ROOT / mutant.file).read_text()
    without = tree.original_code(family, only_float32)
    tree.write(mutant.file, mutant.apply(text), only_float32)
    try:
        status, answer, code = tree.objects(family)
        if status != 0 and "CalledProcessError" not in answer:
            raise RuntimeError(f"{family}: {answer}")
        if status != 0:
            return Verdict("stillborn")
        if code == without:
            return Verdict("same")
        return tree.test(family, first, limit)[0]
    finally:
        tree.write(mutant.file, text, False)
        tree.clean()


def run(
    chosen: Sequence[Mutant], jobs: int, done: Callable[[Mutant, Verdict], None], quick: bool = False
) -> list[Verdict]:
    """The verdict on every mutant. Unless `quick`, the original must first pass the tests of all families concerned."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for module in ("pytest", "edm2ext"):  # loaded here once, not in every child
        importlib.import_module(module)
    made_of = families(ROOT)
    reached = {
        file: [family for family in made_of if file in made_of[family]] for file in {mutant.file for mutant in chosen}
    }
    concerned = sorted({family for names in reached.values() for family in names})
    verdicts: dict[int, Verdict] = {}
    killers: list[str] = []
    with tempfile.TemporaryDirectory(prefix="edm2-mutants-") as folder:
        trees = [Tree(Path(folder) / str(i)) for i in range(jobs)]
        status, answer = in_child(lambda: precompile(trees[0].root, trees[0].build), trees[0].log)
        if status != 0:
            raise RuntimeError(answer)
        limits = dict.fromkeys(concerned, 30.0)
        if not quick:
            for i, limit in _in_parallel([functools.partial(time_limit, family) for family in concerned], trees):
                limits[concerned[i]] = limit
        tasks = [
            lambda tree, m=m: judge(m, tree, reached[m.file], limits, killers)  # `killers` as it is by then
            for m in chosen
        ]
        for i, verdict in _in_parallel(tasks, trees):
            verdicts[i] = verdict
            if "::" in verdict.by:
                killers[:] = [verdict.by, *(name for name in killers if name != verdict.by)]
            done(chosen[i], verdict)
    return [verdicts[i] for i in range(len(chosen))]


def _in_parallel(tasks: Sequence[Callable[[Tree], Any]], trees: Sequence[Tree]) -> Iterator[tuple[int, Any]]:
    """Runs the tasks in forked processes, one for each tree at a time; yields (number, result) as they end."""
    running: dict[int, tuple[int, int, Tree]] = {}
    free, left = list(trees), list(enumerate(tasks))
    try:
        while left or running:
            while left and free:
                number, task = left.pop(0)
                tree = free.pop()
                read, write = os.pipe()
                pid = os.fork()
                if pid == 0:
                    _answer(write, lambda task=task, tree=tree: pickle.dumps(task(tree)))
                os.close(write)
                running[pid] = (number, read, tree)
            # Reading to the end first: a child whose answer fills the pipe would wait for ever.
            ready, _, _ = select.select([read for _, read, _ in running.values()], [], [])
            pid, (number, read, tree) = next(item for item in running.items() if item[1][1] in ready)
            with os.fdopen(read, "rb") as pipe:
                answer = pipe.read()
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            del running[pid]
            free.append(tree)
            if status != 0:
                raise RuntimeError(answer.decode() or f"a process ended with status {status}")
            yield number, pickle.loads(answer)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
