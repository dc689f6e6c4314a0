"""Timing two ways of doing the same work side by side, so that a drifting machine cannot favour either."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of baseline and candidate (medians), and the median over rounds of baseline / candidate."""

    baseline: float
    candidate: float
    speedup: float


# "wall" is what a user waits for; "processor" is disturbed less by other work on the machine, but adds up all threads.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def seconds_per_call(work: Callable[[], object], calls: int, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    for _ in range(calls):
        work()
    return (clock() - start) / calls


def compare(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    rounds: int = 15,
    block_seconds: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Alternate blocks of calls, baseline then candidate and the reverse, after a warm-up of both.

    Each block lasts about `block_seconds`; the speed-up is the median over rounds of the ratio within a round."""
    calls = []
    for work in (baseline, candidate):
        seconds_per_call(work, 2)
        calls.append(max(1, round(block_seconds / max(seconds_per_call(work, 3, clock), 1e-7))))
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        order = (0, 1) if index % 2 == 0 else (1, 0)
        for which in order:
            times[which].append(seconds_per_call((baseline, candidate)[which], calls[which], clock))
    ratios = [b / c for b, c in zip(*times, strict=True)]
    return Comparison(statistics.median(times[0]), statistics.median(times[1]), statistics.median(ratios))
