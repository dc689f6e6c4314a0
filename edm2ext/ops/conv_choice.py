"""Who computes a convolution on a GPU, and how: a choice for every problem, made by `edm2ext.tune`."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

DIRECTIONS = ("forward", "grad x", "grad w")
FOLLOWING = ("", "silu", "sum", "qkv")
# A plan of our kernels (empty: the one that the library makes), or None: torch's convolution; of an MP-Cat's halves:
# that these are joined, and the convolution of the result, a problem of its own, is computed as was chosen for it.
Choice = list[int] | None
LIBRARYS_OWN: list[int] = []


class Problem(NamedTuple):
    """All that the time of a convolution or one of its gradients depends on."""

    direction: int  # index into DIRECTIONS
    batch: int
    height: int
    width: int
    channels: int
    out: int
    kernel_height: int
    kernel_width: int
    dtype: torch.dtype
    follows: str = ""  # of FOLLOWING: what a forward pass does with the result
    keep: bool = False  # and whether it keeps what the backward pass reads: the convolution, or a clipped sum's mask
    cat: int = 0  # channels of the first half, where x is an MP-Cat's halves; keep: the weight's gradient reads x too

    @property
    def is_whole(self) -> bool:
        """Whether our kernels take it without padding its channels."""
        return self.channels % 8 == 0 and self.out % 8 == 0

    def __str__(self) -> str:
        """For example "forward 32x64x64 192->384 3x3 float16 sum keep"; of halves "192+192->192"."""
        channels = f"{self.cat}+{self.channels - self.cat}" if self.cat else str(self.channels)
        sizes = f"{self.batch}x{self.height}x{self.width} {channels}->{self.out}"
        words = [DIRECTIONS[self.direction], sizes, f"{self.kernel_height}x{self.kernel_width}"]
        words += [str(self.dtype).removeprefix("torch."), self.follows, "keep" if self.keep else ""]
        return " ".join(filter(None, words))


def alternatives(problem: Problem) -> list[Problem]:
    """What must be chosen for before, because the problem's own choice is between that and reading halves: the same of
    the concatenation, and for a forward pass the weight's gradients that it leads to."""
    if not problem.cat:
        return []
    whole = problem._replace(keep=False, cat=0)
    if problem.direction > 0:
        return [whole]
    gradients = [whole._replace(direction=2), problem._replace(direction=2, keep=False)] if problem.keep else []
    return [whole, *gradients]


_chosen: dict[Problem, Choice] = {}
_recorded: dict[Problem, None] | None = None


def choice(problem: Problem) -> Choice:
    """What was chosen for the problem; if nothing was, the library's own plan, or torch's convolution instead of
    padding."""
    if _recorded is not None:
        _recorded[problem] = None
    return _chosen.get(problem, LIBRARYS_OWN if problem.is_whole else None)


def choose(chosen: Mapping[Problem, Choice]) -> None:
    """Add to the choices, or replace some."""
    _chosen.update(chosen)


def chosen() -> dict[Problem, Choice]:
    """All choices."""
    return dict(_chosen)


def forget() -> None:
    """Drop all choices."""
    _chosen.clear()


@contextlib.contextmanager
def trying(problem: Problem, choice: Choice) -> Iterator[None]:
    """The choice for the problem within."""
    kept = dict(_chosen)
    _chosen[problem] = choice
    try:
        yield
    finally:
        forget()
        choose(kept)


def is_recording() -> bool:
    """Whether problems are being collected: then meta tensors take the path to our kernels, there or not."""
    return _recorded is not None


@contextlib.contextmanager
def recording() -> Iterator[dict[Problem, None]]:
    """Collects, in order, the problems that are asked about within."""
    global _recorded
    outer, _recorded = _recorded, {}
    try:
        yield _recorded
    finally:
        _recorded = outer
