"""Who computes a convolution on a GPU, and how: a choice for every problem, made by `edm2ext.tune`."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

DIRECTIONS = ("forward", "grad x", "grad w")
FOLLOWING = ("", "silu", "sum", "qkv")
Choice = list[int] | None  # a plan of our kernels (empty: the one that the library makes), or None: torch's convolution
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

    @property
    def is_whole(self) -> bool:
        """Whether our kernels take it without padding its channels."""
        return self.channels % 8 == 0 and self.out % 8 == 0

    def __str__(self) -> str:
        """For example "forward 32x64x64 192->384 3x3 float16 sum keep"."""
        sizes = f"{self.batch}x{self.height}x{self.width} {self.channels}->{self.out}"
        words = [DIRECTIONS[self.direction], sizes, f"{self.kernel_height}x{self.kernel_width}"]
        words += [str(self.dtype).removeprefix("torch."), self.follows, "keep" if self.keep else ""]
        return " ".join(filter(None, words))


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
