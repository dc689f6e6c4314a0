"""Mutation testing of the CUDA kernels: faults are seeded in a copy of the sources, one at a time, and the emulated
tests of some kernel family that the fault reaches must notice.

python tests/emulation/mutate.py [--only TEXT] [--per-file 25] [--jobs 2] [--kept FILE]

Every barrier is removed, and every fault of faults.py made. Other faults (bounds, strides, widths of reductions,
indices, operators, constants, rounding, conditions, dropped statements) are made wherever the source offers one, and a
sample of them, the same in every run, is tried for each file. A fault whose object code is that of the original is no
fault. Those that no test can notice are in UNNOTICEABLE, with the reason, and are not tried. Exits with 1 unless every
barrier, every planted fault and 95 % of the others are noticed.

Not mutated: comments, declarations of traffic (tests/test_traffic.py), the formulae of math.h (tests/ops), the torch
layer (csrc/torch).
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from seeding import ALWAYS, OPERATORS, Mutant, sample
from trials import HERE, ROOT, Verdict, families, run
from unnoticeable import why_unnoticeable


@dataclasses.dataclass
class Result:
    """What became of one mutant; `excuse`: why no test can notice it."""

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
    """What became of every mutant. Each verdict is added to the file `kept`; those that are there are taken from it
    while what they depend on has not changed: the file with the fault, and for one that survived the tests as well."""
    texts = sources()
    tests = tests_of(texts)
    lines = kept.read_text().splitlines() if kept is not None and kept.exists() else []
    verdicts: dict[Mutant, Verdict] = {}
    for entry in map(json.loads, lines):
        mutant, verdict = Mutant(**entry["mutant"]), Verdict(**entry["verdict"])
        unchanged = entry["source"] == digest(texts.get(mutant.file, ""))
        if unchanged and (verdict.outcome != "survived" or entry["tests"] == tests[mutant.file]):
            verdicts[mutant] = verdict
    excuses = {mutant: why_unnoticeable(mutant, texts[mutant.file]) for mutant in chosen}
    for mutant in chosen:
        if excuses[mutant]:
            verdicts.setdefault(mutant, Verdict("untried"))
    left = [mutant for mutant in chosen if mutant not in verdicts]

    def done(mutant: Mutant, verdict: Verdict) -> None:
        verdicts[mutant] = verdict
        tried.append(mutant)
        number = f"{len(chosen) - len(left) + len(tried)}/{len(chosen)}"
        print(number, mutant.file, mutant.operator, verdict.outcome, verdict.by, flush=True)
        if kept is not None:
            text = texts[mutant.file]
            entry = {key: dataclasses.asdict(value) for key, value in (("mutant", mutant), ("verdict", verdict))}
            entry.update(change=mutant.change(text), source=digest(text), tests=tests[mutant.file])
            with kept.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    tried: list[Mutant] = []
    if left:
        run(left, jobs, done, quick)
    return [Result(m, verdicts[m], m.diff(texts[m.file]), excuses[m]) for m in chosen]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tests_of(files: Iterable[str]) -> dict[str, str]:
    """A digest of the tests that a fault in each file reaches."""
    made_of = families(ROOT)
    texts = {name: (HERE / f"test_emulated_{name}.py").read_text() for name in made_of}
    shared = (HERE / "emulated.py").read_text()
    return {file: digest(shared + "".join(texts[name] for name in made_of if file in made_of[name])) for file in files}


def report(results: Sequence[Result]) -> Iterator[str]:
    """A table by file, and the diff of every survivor."""
    yield "| file | barriers killed | planted killed | others killed | excused | no other code | does not compile |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name in [*sorted({r.mutant.file for r in results}), "total"]:
        here = [r for r in results if name in (r.mutant.file, "total")]
        groups = [[r for r in here if r.counts and r.mutant.operator == operator] for operator in ALWAYS]
        groups.append([r for r in here if r.counts and r.mutant.operator not in ALWAYS])
        counts = [sum(r.verdict.outcome == outcome for r in here) for outcome in ("same", "stillborn")]
        excused = sum(bool(r.excuse) and r.verdict.outcome in ("survived", "untried") for r in here)
        killed = [f"{sum(not r.survived for r in group)} of {len(group)}" for group in groups]
        yield f"| {name} | {' | '.join(killed)} | {excused} | {counts[0]} | {counts[1]} |"
    for result in results:
        if result.verdict.outcome in ("survived", "untried"):
            note = f"excused ({result.excuse})" if result.excuse else "survived"
            yield f"\n{note}: {result.mutant.file}, {result.mutant.operator}\n{result.diff}"


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
