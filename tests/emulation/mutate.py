"""Mutation testing of the CUDA kernels: faults are seeded in a copy of the sources, one at a time, and the emulated
tests of some kernel family that the fault reaches must notice.

python tests/emulation/mutate.py [--only TEXT] [--per-file 25] [--jobs 2] [--kept FILE]

Every barrier is removed, and every fault of faults.py made. Other faults (bounds, strides, widths of reductions,
indices, operators, constants, rounding, conditions, dropped statements) are made wherever the source offers one, and a
sample of them, the same in every run, is tried for each file. A fault whose object code is that of the original is no
fault. Those that no test can notice are in UNNOTICEABLE, with the reason. Exits with 1 unless every barrier, every
planted fault and 95 % of the others are noticed.

Not mutated: comments, declarations of traffic (tests/test_traffic.py), the formulae of math.h (tests/ops), the torch
layer (csrc/torch).
"""

import argparse
import dataclasses
import difflib
import fnmatch
import functools
import importlib
import itertools
import json
import os
import pickle
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from faults import FAULTS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDERS = ("cuda", "include", "torch")  # of csrc, that the emulation compiles
LAUNCH = "csrc/cuda/launch.h"
PATIENCE = 10  # a test that takes so many times as long as the slowest without a fault loops for ever

_BRACKETS = r"\([^()]*(?:\([^()]*\)[^()]*)*\)"
# Name of the file, pattern that occurs in "line before => line after", why no test can notice.
UNNOTICEABLE: list[tuple[str, str, str]] = [
    ("launch.h", r"\|\| shared > kSharedWithoutAsking", "asks for shared memory that is granted anyway"),
    (
        "*",
        r"^[^;]*\b(kBlocksPerMultiprocessor|lanes_for\(|kResidentBlocks)[^;]*;? => ",
        "shares out the work otherwise; same result",
    ),
    (
        "mp_silu.cu",
        r"chunks >= 1 \? workspace",
        "with one chunk the workspace is empty, and the address of nothing null",
    ),
    (
        "ema_update.cuh",
        r"high = tensors( \+ 1| - \(1 - 1\));$",
        "first_chunk[tensors] is beyond every chunk: the search turns back there",
    ),
    (
        "rows.cuh",
        r"^sync\(\); => ;$",
        "the shuffles before it order a warp's threads in the emulation; on a GPU they do not order memory",
    ),
    (
        "resample_down_pixel_norm.cuh",
        r"if \(groups\.lane != 0\) rms\[index\]",
        "the sum over a warp is the same in all of its lanes: any may store it",
    ),
    ("normalize_weight.cu", r"if \(count < kFew\)", "the large table also takes so few"),
    ("normalize_weight.cu", r"first <= count; first \+= kMany", "one more table, an empty one, is not launched"),
    (
        "*",
        r"first = groups\.first; first <= (\w+); first \+= groups\.step",
        "groups of lanes beyond the last item are idle, also in a warp that has no other",
    ),
    ("rows.cuh", r"first <= count; first \+= kBatch", "of what is beyond the end nothing is loaded"),
    ("mp_silu.cuh", r"column = static_cast<int>\(blockDim", "a tile is never wider than the block has threads"),
    (
        "*.cu",
        rf"^(.*(?:\blaunch\(|\bwork\b|\bblocks_for\b).*)ceil_div{_BRACKETS}(.*) => \1ceil_div{_BRACKETS}\2$",
        "the number of blocks alone: every kernel strides over the grid",
    ),
    (
        "*.cu",
        r"packs_per_lane (?:<= (\d+)\b.* => .*packs_per_lane < \1\b|> (k\w+).* => .*packs_per_lane >= \2)"
        r"|head_dim <= kWarpSize \* N\b.* => .*head_dim < kWarpSize \* N\b",
        "rows of exactly so many packs are also right in the kernel for longer ones",
    ),
    (
        "launch.h",
        r"while \(lanes < packs .* => while \(\(lanes / 2\) < packs ",
        "more lanes than packs: the others idle",
    ),
    (
        "*",
        r"(\S+) < (\S+) \? \1 : \2(.*) => .*\1 <= \2 \? \1 : \2\3$",
        "the smaller of equal numbers is either of them",
    ),
]


# ------------------------------------------------------------------------------------------------------------- mutants


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one file: text[start:end] becomes `replacement`. `file` is relative to the root of the sources."""

    file: str
    operator: str
    start: int
    end: int
    replacement: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]

    def change(self, text: str) -> str:
        """What the line, or the lines, were and are: "before => after"."""
        changed = self.apply(text)
        begin = text.rfind("\n", 0, self.start) + 1
        lines = (
            text[begin : text.find("\n", self.end)],
            changed[begin : changed.find("\n", self.start + len(self.replacement))],
        )
        return " => ".join(" ".join(line.split()) for line in lines)

    def diff(self, text: str) -> str:
        before, after = text.splitlines(), self.apply(text).splitlines()
        lines = list(difflib.unified_diff(before, after, self.file, self.file, lineterm="", n=0))
        return "\n".join(lines[2:])


_CLAMP = r"\bif \((\S+) [<>]=? ([^()]+)\) \1 = \2;"  # where equality changes nothing
_BARRIER = r"__sync(threads|warp)\([^()]*\);"
_SWAPS = {
    "bound": {" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > "},
    "equality": {" == ": " != ", " != ": " == "},
    "arithmetic": {" + ": " - ", " - ": " + ", " * ": " + ", " / ": " * ", " % ": " / "},
    "logic": {" && ": " || ", " || ": " && ", "true": "false", "false": "true", "(!": "("},
    "accumulation": {" += ": " = ", " -= ": " += "},
    "stride": {" += ": " += 2 * ", " *= 2": " *= 4", " /= 2": " /= 4"},
    "index": {
        "threadIdx.x": "threadIdx.y",
        "threadIdx.y": "threadIdx.x",
        "blockIdx.x": "threadIdx.x",
        "gridDim.x": "blockDim.x",
        "blockDim.x": "blockDim.y",
        "blockDim.y": "blockDim.x",
    },
    "width": {"kWarpSize": "(kWarpSize / 2)", "kThreads": "(kThreads / 2)", "lanes": "(lanes / 2)", "kPack<T>": "1"},
    "smallest": {"std::min": "std::max", "std::max": "std::min", "fminf": "fmaxf", "fmaxf": "fminf"},
}
_ROUNDED = "__bfloat162float(__float2bfloat16_rn({}))"
# Operator, pattern, its replacement (a template for re.Match.expand).
_REWRITES = [
    ("condition", r"\bif \((?!constexpr)(.*)\) ", r"if (!(\1)) "),
    ("condition", r"\? ([\w.:]+) : ([\w.:]+)", r"? \2 : \1"),
    ("constant", r"(?<![\w.])(\d+)(?![\w.])", r"(\1 + 1)"),
    ("constant", r"(?<![\w.])([1-9]\d*)(?![\w.])", r"(\1 - 1)"),
    ("constant", r"(?<![\w.])(\d+\.\d*f)", r"(\1 + 1)"),
    ("stride", r"\+\+(\w+)", r"\1 += 2"),
    ("rounding", r"(?<=\bfloat )(\w+ = )(?!-?[\d.]+f;)([^;{}]+);", r"\1" + _ROUNDED.format(r"\2") + ";"),
    ("rounding", r"(?<=from_float<T>)\(([^()]+)\)", "(" + _ROUNDED.format(r"\1") + ")"),
    ("dropped", r"\b(break|continue|return);", ";"),
    ("dropped", r"(?<=^)( *)[\w.\[\]>()-]+ [-+*/]?= [^;{}]*;$", r"\1;"),
    ("dropped", r"(?<=^)( *)[\w.:<>]+\([^;{}]*\);$", r"\1;"),
    ("dropped", r"(?<=[)] )[\w.\[\]>-]+ [-+*/]?= [^;{}]*;$", ";"),
]
# What is no code that could go wrong, or has no meaning under emulation.
_NO_CODE = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"|^#[^\n]*|\btemplate <[^\n]*|\b__launch_bounds__\([^\n]*|\bstatic_assert\([^;]*;"
    r"|^[^\n]*\b(bytes|\w+_bytes|\w*[Tt]raffic|tally|namespace|using)\b[^\n]*|\w+_sync\(|\boperator\W+",
    re.MULTILINE | re.DOTALL,
)


ALWAYS = ("barrier", "planted")  # operators of which every fault is tried
OPERATORS = (*ALWAYS, *dict.fromkeys([*_SWAPS, *(operator for operator, _, _ in _REWRITES)]))


def mutants(file: str, text: str) -> Iterator[Mutant]:
    """Every fault that can be seeded in the text: barriers left out, those of faults.py, then the other operators'."""
    for match in re.finditer(_BARRIER, _without(re.compile(r"//[^\n]*"), text)):
        yield Mutant(file, "barrier", match.start(), match.end(), ";")
    for name, old, new in FAULTS:  # wherever the text occurs, at once
        if file == f"csrc/cuda/{name}" and old in text:
            start, end = text.find(old), text.rfind(old) + len(old)
            yield Mutant(file, "planted", start, end, text[start:end].replace(old, new))
    code = _without(_NO_CODE, text)
    clamps = {i for match in re.finditer(_CLAMP, code) for i in range(*match.span())}
    for operator, swaps in _SWAPS.items():
        for old, new in swaps.items():
            pattern = re.escape(old)
            if old[0].isalpha():  # a whole word, and no declaration
                pattern = r"(?<!\bint )(?<!int64_t )\b" + pattern + (r"\b" if old[-1].isalnum() else "")
            for match in re.finditer(pattern, code):
                if operator == "bound" and match.start() in clamps:
                    continue
                yield Mutant(file, operator, match.start(), match.end(), new)
    for operator, pattern, template in _REWRITES:
        for match in re.finditer(pattern, code, re.MULTILINE):
            if "__sync" not in match[0]:
                yield Mutant(file, operator, match.start(), match.end(), match.expand(template))


def _without(pattern: "re.Pattern[str]", text: str) -> str:
    """The text with what the pattern matches blanked out, so that places stay."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def sample(file: str, text: str, count: int, operators: Sequence[str] | None = None) -> list[Mutant]:
    """All barriers and planted faults of a file and `count` others (0: all), the operators (None: all) taking turns."""
    every = [m for m in mutants(file, text) if operators is None or m.operator in operators]
    chosen = [mutant for mutant in every if mutant.operator in ALWAYS]
    by_operator: dict[str, list[Mutant]] = {}
    for mutant in (m for m in every if m.operator not in ALWAYS):
        by_operator.setdefault(mutant.operator, []).append(mutant)
    shuffle = random.Random(zlib.crc32(file.encode())).shuffle
    for group in by_operator.values():
        shuffle(group)
    others = [m for turn in range(len(every)) for group in by_operator.values() for m in group[turn : turn + 1]]
    return chosen + (others[:count] if count else others)


def why_unnoticeable(mutant: Mutant, text: str) -> str:
    """The reason listed for a mutant that no test can notice, or an empty string, as always for a planted one."""
    if mutant.operator == "planted":
        return ""
    name, change = Path(mutant.file).name, mutant.change(text)
    fitting = (why for file, what, why in UNNOTICEABLE if fnmatch.fnmatch(name, file) and re.search(what, change))
    return next(fitting, "")


# ------------------------------------------------------------------------------------------------------------ families


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


# ------------------------------------------------------------------------------------------------- running, in children


@dataclasses.dataclass
class Verdict:
    """`outcome`: killed, survived, same (object code), stillborn (does not compile); `by`: what noticed, and where;
    `seconds` of processor time it took."""

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
    texts = [file.read_text() for file in (root / "csrc" / "cuda").iterdir()]
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
        self.log = folder / "log"
        self.build.mkdir(parents=True)
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


class Original(NamedTuple):
    """A family without a fault: its object code, by whether it is for float32 alone, and the time limit for its tests.

    Most faults are noticed in float32, and kernels for it alone compile several times as fast: they are tried first.
    """

    codes: dict[bool, bytes]
    seconds: float


def stages(family: str) -> list[bool]:
    """Whether to compile for float32 alone: first so, then not, where that makes a difference."""
    names = families(ROOT)[family] - {LAUNCH}
    return [True, False] if any("dispatch_storage(" in (ROOT / name).read_text() for name in names) else [False]


def original(family: str, tree: Tree) -> Original:
    """Raises RuntimeError unless the family passes its tests."""
    codes = {}
    slowest = 0.0
    for only_float32 in stages(family):
        tree.write(LAUNCH, (ROOT / LAUNCH).read_text(), only_float32)
        status, answer, codes[only_float32] = tree.objects(family)
        if status != 0:
            raise RuntimeError(f"{family} does not compile: {answer}")
        verdict, slowest = tree.test(family, [], 600)
        tree.clean()
        if verdict.outcome == "killed":
            raise RuntimeError(f"{family}: its tests fail without a fault: {verdict.by}")
    return Original(codes, 1 + PATIENCE * slowest)


def judge(
    mutant: Mutant, tree: Tree, reached: Sequence[str], originals: dict[str, Original], first: Sequence[str]
) -> Verdict:
    """Tries a mutant on the families it reaches until one notices, its own first, then those that last found faults."""
    started = sum(os.times()[:4])
    order = {name.split("::")[0]: i for i, name in reversed(list(enumerate(first)))}
    places = {family: order.get(f"test_emulated_{family}.py", len(order)) for family in reached}
    in_turn = sorted(reached, key=lambda name: (name != Path(mutant.file).stem, places[name]))
    verdict = Verdict("same")
    for family, only_float32 in [(name, stage) for name in in_turn for stage in originals[name].codes]:
        now = _judge_build(mutant, family, only_float32, tree, originals[family], first)
        verdict = verdict if now.outcome == "same" else now
        if verdict.outcome in ("killed", "stillborn"):
            break
    return dataclasses.replace(verdict, seconds=sum(os.times()[:4]) - started)


def _judge_build(
    mutant: Mutant, family: str, only_float32: bool, tree: Tree, original: Original, first: Sequence[str]
) -> Verdict:
    text = (ROOT / mutant.file).read_text()
    tree.write(mutant.file, mutant.apply(text), only_float32)
    try:
        status, answer, code = tree.objects(family)
        if status != 0 and "CalledProcessError" not in answer:
            raise RuntimeError(f"{family}: {answer}")
        if status != 0:
            return Verdict("stillborn")
        if code == original.codes[only_float32]:
            return Verdict("same")
        verdict, _ = tree.test(family, first, original.seconds)
        if verdict.outcome == "survived" and not original.codes[only_float32]:  # which was not compiled before
            tree.write(mutant.file, text, only_float32)
            return Verdict("same") if tree.objects(family)[2] == code else verdict
        return verdict
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
        originals = {family: Original(dict.fromkeys(stages(family), b""), 30) for family in concerned}
        if not quick:
            for i, result in _in_parallel([functools.partial(original, family) for family in concerned], trees):
                originals[concerned[i]] = result
        tasks = [
            lambda tree, m=m: judge(m, tree, reached[m.file], originals, killers)  # `killers` as it is by then
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


# -------------------------------------------------------------------------------------------------------------- report


@dataclasses.dataclass
class Result:
    """What became of one mutant; `excuse`: why it may survive."""

    mutant: Mutant
    verdict: Verdict
    diff: str
    excuse: str

    @property
    def counts(self) -> bool:
        """Whether a test should have noticed."""
        return self.verdict.outcome in ("killed", "survived") and not (
            self.excuse and self.verdict.outcome == "survived"
        )

    @property
    def survived(self) -> bool:
        return self.counts and self.verdict.outcome == "survived"


def sources(root: Path = ROOT) -> dict[str, str]:
    """{path from the root: text} of the files to mutate."""
    files = {name for parts in families(root).values() for name in parts}
    skipped = {f"csrc/include/edm2/{name}.h" for name in ("math", "traffic")}
    return {name: (root / name).read_text() for name in sorted(files - skipped) if name.startswith("csrc/")}


def mutate(chosen: Sequence[Mutant], jobs: int, quick: bool = False, kept: "Path | None" = None) -> list[Result]:
    """What became of every mutant. Each verdict is added to the file `kept`; those that are there are taken from it."""
    texts = sources()
    lines = kept.read_text().splitlines() if kept is not None and kept.exists() else []
    entries = [json.loads(line) for line in lines]
    verdicts = {Mutant(**entry["mutant"]): Verdict(**entry["verdict"]) for entry in entries}
    left = [mutant for mutant in chosen if mutant not in verdicts]

    def done(mutant: Mutant, verdict: Verdict) -> None:
        verdicts[mutant] = verdict
        tried.append(mutant)
        number = f"{len(chosen) - len(left) + len(tried)}/{len(chosen)}"
        print(number, mutant.file, mutant.operator, verdict.outcome, verdict.by, flush=True)
        if kept is not None:
            entry = {key: dataclasses.asdict(value) for key, value in (("mutant", mutant), ("verdict", verdict))}
            with kept.open("a") as file:
                file.write(json.dumps({**entry, "change": mutant.change(texts[mutant.file])}) + "\n")

    tried: list[Mutant] = []
    if left:
        run(left, jobs, done, quick)
    return [Result(m, verdicts[m], m.diff(texts[m.file]), why_unnoticeable(m, texts[m.file])) for m in chosen]


def report(results: Sequence[Result]) -> Iterator[str]:
    """A table by file, and the diff of every survivor."""
    yield "| file | barriers killed | planted killed | others killed | excused | no other code | does not compile |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name in [*sorted({r.mutant.file for r in results}), "total"]:
        here = [r for r in results if name in (r.mutant.file, "total")]
        groups = [[r for r in here if r.counts and r.mutant.operator == operator] for operator in ALWAYS]
        groups.append([r for r in here if r.counts and r.mutant.operator not in ALWAYS])
        counts = [sum(r.verdict.outcome == outcome for r in here) for outcome in ("same", "stillborn")]
        excused = sum(r.verdict.outcome == "survived" and not r.counts for r in here)
        killed = [f"{sum(not r.survived for r in group)} of {len(group)}" for group in groups]
        yield f"| {name} | {' | '.join(killed)} | {excused} | {counts[0]} | {counts[1]} |"
    for result in results:
        if result.verdict.outcome == "survived":
            note = f" (excused: {result.excuse})" if result.excuse else ""
            yield f"\nsurvived{note}: {result.mutant.file}, {result.mutant.operator}\n{result.diff}"


def score(results: Sequence[Result]) -> float:
    """Share of the sampled faults that were noticed."""
    others = [r for r in results if r.counts and r.mutant.operator not in ALWAYS]
    return 1 - sum(r.survived for r in others) / max(len(others), 1)


def passes(results: Sequence[Result], at_least: float) -> bool:
    return score(results) >= at_least and not any(r.survived for r in results if r.mutant.operator in ALWAYS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--operators", nargs="*", choices=OPERATORS, help="only these kinds")
    parser.add_argument(
        "--per-file", type=int, default=25, help="faults besides barriers and planted ones (0: every one)"
    )
    parser.add_argument("--quick", action="store_true", help="do not test the original first")
    parser.add_argument("--at-least", type=float, default=0.95, help="share of the faults to be noticed")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kept", type=Path, help="add every verdict to this file, and take from it those it has")
    options = parser.parse_args()
    texts = {name: text for name, text in sources().items() if options.only in name}
    samples = [sample(name, text, options.per_file, options.operators) for name, text in texts.items()]
    # All files take turns: what an interrupted run has tried is a smaller sample of everything.
    chosen = [m for turn in itertools.zip_longest(*samples) for m in turn if m is not None]
    chosen.sort(key=lambda mutant: OPERATORS.index(mutant.operator) if mutant.operator in ALWAYS else len(ALWAYS))
    results = mutate(chosen, options.jobs, options.quick, options.kept)
    print("\n".join(report(results)))
    seconds = sum(result.verdict.seconds for result in results)
    print(f"\n{100 * score(results):.1f} % of the faults noticed; {len(results)} tried in {seconds:.0f} s of one core")
    return 0 if passes(results, options.at_least) else 1


if __name__ == "__main__":
    sys.exit(main())
