"""Where faults can be seeded in the text of a kernel file, and which of them are tried."""

import dataclasses
import difflib
import random
import re
import zlib
from collections.abc import Iterator, Sequence

from faults import FAULTS


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
