"""Chooses who computes each convolution on the GPU at hand: our kernels, with one of their plans, or torch's.

python -m edm2ext.tune --preset img512-s --batch 32 [--precision fp16] [--again] [--save FILE]
python -m edm2ext.tune --preset img512-s --batch 32 --list

For every convolution and gradient that a training step of the preset computes on one GPU, with what follows it in the
forward pass and the MP-Cat before it, it times our kernels and torch's convolution with separate kernels, and keeps the
fastest in a file of the user's cache folder, one for each GPU and build. A plan whose result is not torch's up to
rounding is never chosen. `python_train.run` does the same for its network when it starts on a GPU, and keeps the
choices in its training states, for they change the last bits. --list prints the problems and what would be tried, and
needs no GPU.
"""

import ctypes
import hashlib
import json
import math
import os
import re
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from edm2ext import _library
from edm2ext.ops import conv_choice
from edm2ext.ops.conv_choice import DIRECTIONS, LIBRARYS_OWN, Choice, Problem
from edm2ext.ops.mp_cat_conv2d import forward_of_halves, gradient_of_weight_of_halves
from edm2ext.ops.mp_conv2d import convolve_forward, gradient_of_input, gradient_of_weight

VERSION = 1  # of the file
TORCHS = "torch"  # how a file calls the choice None
Result = Tensor | tuple[Tensor, ...]  # q, k and v are several
Measure = Callable[[Problem, Choice], float]  # milliseconds; raises RuntimeError where a choice cannot serve
_MOST_PLANS = 64
_AGAIN = 3  # the fastest are timed twice
_FLUSH_BYTES = 2**28  # more than any second-level cache
_REPEATS = 15
_CLIP = 256.0  # a sum's, or its mask's
_BALANCE = 0.5  # MP-Cat's t
_DIFFERENCE = 0.02  # of the largest value: far above rounding in 16 bits, far below a wrong index
_KEY = re.compile(
    r"(forward|grad x|grad w) (\d+)x(\d+)x(\d+) (\d+)(?:\+(\d+))?->(\d+) (\d+)x(\d+) (float16|bfloat16)"
    r"( silu| sum| qkv)?( keep)?"
)


# ---- choices as text ----


def problem_of(text: str) -> Problem:
    """What str(problem) wrote. Raises ValueError for any other text."""
    match = _KEY.fullmatch(text)
    if match is None:
        raise ValueError(f'tune: expected a convolution such as "forward 8x64x64 192->192 3x3 float16", got {text!r}')
    direction, batch, height, width, first, second, *sizes, dtype, follows, keep = match.groups()
    channels, cat = (int(first) + int(second), int(first)) if second else (int(first), 0)
    numbers = [int(batch), int(height), int(width), channels, *map(int, sizes)]
    about = (getattr(torch, dtype), (follows or "").strip(), bool(keep), cat)
    return Problem(DIRECTIONS.index(direction), *numbers, *about)


def choices() -> dict[str, list[int] | str]:
    """What is chosen in this process, in words and numbers: for a checkpoint, or a file."""
    return _as_text(conv_choice.chosen())


def load(saved: Mapping[str, list[int] | str]) -> None:
    """Pin choices that `choices` returned, here or on another machine: they are used as they are, and never timed.

    A plan for kernels that this build lacks is left out, with a warning. Raises ValueError for anything else.
    """
    conv_choice.choose(_usable(_from_text(saved)))


def _as_text(chosen: Mapping[Problem, Choice]) -> dict[str, list[int] | str]:
    return {str(problem): TORCHS if choice is None else list(choice) for problem, choice in chosen.items()}


def _from_text(saved: Mapping[str, list[int] | str]) -> dict[Problem, Choice]:
    found: dict[Problem, Choice] = {}
    for text, choice in saved.items():
        plan = isinstance(choice, list) and len(choice) in (0, 2) and all(type(n) is int and n >= 0 for n in choice)
        if not plan and choice != TORCHS:
            raise ValueError(f'tune: expected [], [tile, splits] or "{TORCHS}" for {text!r}, got {choice!r}')
        found[problem_of(text)] = None if choice == TORCHS else list(choice)
    return found


def _usable(chosen: Mapping[Problem, Choice]) -> dict[Problem, Choice]:
    """Without the plans for kernels that are not there."""
    tiles = {tile for tile, _ in plans(Problem(0, 1, 8, 8, 64, 64, 1, 1, torch.float16), 1)}
    left_out = [problem for problem, choice in chosen.items() if choice and choice[0] not in tiles]
    if left_out:
        warnings.warn(f"tune: no kernels here for the plans of {len(left_out)} convolutions", stacklevel=3)
    return {problem: choice for problem, choice in chosen.items() if problem not in left_out}


# ---- the file ----


def cache_file(gpu: str) -> Path:
    """Where the choices for a GPU of that name and this build are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edm2ext"
    build = hashlib.sha256(f"{torch.__version__} {torch.backends.cudnn.version()} ".encode())
    if _library.PATH is not None:
        build.update(Path(_library.PATH).read_bytes())
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu)
    return folder / f"convolutions-{VERSION}-{name}-{build.hexdigest()[:12]}.json"


def read(file: Path) -> dict[Problem, Choice]:
    """The choices in a file; none, with a warning, if it is damaged or of another version."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"expected version {VERSION}")
        return _usable(_from_text(content["choices"]))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        warnings.warn(f"tune: {file} is passed over: {error}", stacklevel=2)
        return {}


def write(file: Path, chosen: Mapping[Problem, Choice]) -> None:
    """Add choices to a file, which is whole at every moment; another process may add to it too. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    together = {**(read(file) if file.exists() else {}), **chosen}
    content = json.dumps({"version": VERSION, "choices": _as_text(together)}, indent=1) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as temporary:
        try:
            temporary.write(content)
            temporary.flush()
            os.fsync(temporary.fileno())
            os.replace(temporary.name, file)
        except BaseException:
            os.unlink(temporary.name)
            raise


# ---- choosing ----


class GPU(NamedTuple):
    """What plans are made for."""

    name: str
    multiprocessors: int
    wgmma: bool = False  # it has Hopper's tensor cores


def gpu_at_hand() -> GPU:
    """The current GPU. Raises RuntimeError if there is none."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return GPU(properties.name, properties.multi_processor_count, (properties.major, properties.minor) == (9, 0))


def available() -> bool:
    """Whether there is anything to choose: the current GPU, and convolutions for it in this build."""
    there = torch.cuda.is_available() and _library.has_kernel("mp_conv2d", "cuda")
    return there and _library.runs_on_gpu(torch.cuda.current_device())


def plans(problem: Problem, multiprocessors: int, wgmma: bool = True) -> list[list[int]]:
    """Plans of our kernels worth trying, for every tile the likeliest; with `wgmma` those for Hopper, if this build
    has them."""
    if not _library.LOADED:
        return []
    library = ctypes.CDLL(str(_library.PATH))
    sizes = (ctypes.c_int64 * 7)(*problem[1:8])
    found = (ctypes.c_int64 * (2 * _MOST_PLANS))()
    hopper = wgmma and library.edm2_has_conv_wgmma()
    count = library.edm2_conv_plans(problem.direction, sizes, multiprocessors, int(hopper), found)
    return [[found[2 * i], found[2 * i + 1]] for i in range(count)]


def offers(problem: Problem, gpu: GPU) -> list[Choice]:
    """All that is tried: the library's own plan, others, torch's convolution; of an MP-Cat's halves, which Hopper's
    kernels do not read, the best convolution of their concatenation."""
    return [LIBRARYS_OWN, *plans(problem, gpu.multiprocessors, gpu.wgmma and not problem.cat), None]


Times = dict[str, float]  # milliseconds, by choice as text


def pick(problem: Problem, offered: Sequence[Choice], measure: Measure) -> tuple[Choice, Times]:
    """The fastest, and all times; the best few are timed twice. What cannot serve is left out with a warning; raises
    RuntimeError if nothing can."""

    def time_of(choice: Choice) -> float:
        try:
            return measure(problem, choice)
        except RuntimeError as error:
            warnings.warn(f"tune: {problem}: {name_of(choice)} is left out: {error}", stacklevel=3)
            return math.inf

    timed = [(time_of(choice), index) for index, choice in enumerate(offered)]
    timed = [(time, index) for time, index in timed if time < math.inf]
    if not timed:
        raise RuntimeError(f"tune: nothing computes {problem}")
    best = [(min(time, measure(problem, offered[index])), index) for time, index in sorted(timed)[:_AGAIN]]
    times = {name_of(offered[index]): time for time, index in [*timed, *best]}
    return offered[min(best)[1]], times


def name_of(choice: Choice) -> str:
    return TORCHS if choice is None else "x".join(map(str, choice)) or "own"


def with_alternatives(problems: Iterable[Problem]) -> list[Problem]:
    """The problems, each once, and before them what must be chosen for first."""
    return list(dict.fromkeys(p for problem in problems for p in (*conv_choice.alternatives(problem), problem)))


def tune(
    problems: Iterable[Problem], measure: Measure | None = None, gpu: GPU | None = None, again: bool = False
) -> dict[Problem, Times]:
    """See to it that all problems and their alternatives are chosen for: from now on ops take the choices, under CUDA
    graphs too.

    Choices of this process are kept, then those of the file; the rest are timed (with `again` all), by rank 0 for all
    processes, and added to the file. Returns the times taken, on rank 0. Raises RuntimeError while a CUDA graph is
    captured, or without a GPU unless `measure` and `gpu` are given.
    """
    missing = [problem for problem in with_alternatives(problems) if again or problem not in conv_choice.chosen()]
    if not missing:
        return {}
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: convolutions cannot be timed while a CUDA graph is captured")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    shared: list[dict[str, list[int] | str]] = [{}]
    times: dict[Problem, Times] = {}
    if not distributed or torch.distributed.get_rank() == 0:
        gpu = gpu or gpu_at_hand()
        file = cache_file(gpu.name)
        known = {} if again else read(file)
        decided = {problem: known[problem] for problem in missing if problem in known}
        measure = measure or Timer()
        for problem in missing:
            if problem not in decided:
                decided[problem], times[problem] = pick(problem, offers(problem, gpu), measure)
            conv_choice.choose({problem: decided[problem]})  # what is timed next may be computed as chosen here
        if times:
            _keep(file, {problem: decided[problem] for problem in times})
        shared = [_as_text(decided)]
    if distributed:
        torch.distributed.broadcast_object_list(shared, src=0)
    conv_choice.choose(_from_text(shared[0]))
    return times


def _keep(file: Path, chosen: Mapping[Problem, Choice]) -> None:
    try:
        write(file, chosen)
    except OSError as error:
        warnings.warn(f"tune: the choices hold for this process only: {error}", stacklevel=3)


# ---- timing ----


def milliseconds(work: Callable[[], object], flush: Tensor, repeats: int = _REPEATS) -> float:
    """The median over calls by CUDA events, each after the second-level cache was overwritten."""
    times = []
    for index in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


class Timer:
    """Times a choice on random operands, after comparing its result with torch's."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self.flush = torch.empty(_FLUSH_BYTES // 4, device=device)
        self.problem: Problem | None = None
        self.work: Callable[[], Result]
        self.expected: Tensor

    def __call__(self, problem: Problem, choice: Choice) -> float:
        """Milliseconds. Raises RuntimeError if the choice cannot compute the problem, or computes something else."""
        if problem != self.problem:
            self.work = work_of(problem, self.device)
            with conv_choice.trying(problem, None):
                self.expected = _values(self.work())
            self.problem = problem
        with conv_choice.trying(problem, choice):
            difference = (_values(self.work()) - self.expected).abs().max().item()
            allowed = _DIFFERENCE * self.expected.abs().max().item()
            if not difference <= allowed:
                raise RuntimeError(f"its result is off by {difference:.3g}, expected at most {allowed:.3g}")
            return self.time()

    def time(self) -> float:
        return milliseconds(self.work, self.flush)


def _values(result: Result) -> Tensor:
    return torch.cat([part.float().flatten() for part in ((result,) if isinstance(result, Tensor) else result)])


def work_of(problem: Problem, device: str) -> Callable[[], Result]:
    """The convolution or gradient as ops compute it, with the choice of the moment, on random operands.

    With the forward pass of an MP-Cat's halves goes all that its choice decides about: MP-SiLU of them with or without
    the concatenation, and in training the weight's gradient, which reads the one or the other."""
    generator = torch.Generator(device).manual_seed(0)

    def make(*sizes: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(sizes, device=device, generator=generator)
        return values.to(problem.dtype).contiguous(memory_format=torch.channels_last)

    image = (problem.height, problem.width)
    fan_in = problem.channels * problem.kernel_height * problem.kernel_width
    w = make(problem.out, problem.channels, problem.kernel_height, problem.kernel_width, scale=fan_in**-0.5)
    if problem.cat:
        sizes = problem.cat, problem.channels - problem.cat
        a, b = (make(problem.batch, channels, *image) for channels in sizes)
        return _work_of_halves(problem, a, b, w, make(problem.batch, problem.out, *image))
    x = make(problem.batch, problem.channels, *image)
    if problem.direction > 0:
        grad = make(problem.batch, problem.out, *image)
        if problem.direction == 1:
            return lambda: gradient_of_input(grad, w, x)
        return lambda: gradient_of_weight(grad, x, w)
    other = None
    if problem.follows == "silu":
        other = make(problem.batch, problem.out, 1, 1).flatten(1)
    elif problem.follows == "sum":
        other = make(problem.batch, problem.out, *image)
    return lambda: convolve_forward(x, w, other, problem.follows, 0.3, _CLIP, problem.keep)[0]


def _work_of_halves(problem: Problem, a: Tensor, b: Tensor, w: Tensor, grad: Tensor) -> Callable[[], Result]:
    if problem.direction > 0:
        return lambda: gradient_of_weight_of_halves(grad, a, b, w, _BALANCE)

    def work() -> Tensor:
        y, _, x = forward_of_halves(a, b, w, _BALANCE, problem.keep)
        if problem.keep and x is None:
            gradient_of_weight_of_halves(grad, a, b, w, _BALANCE)
        elif problem.keep:
            gradient_of_weight(grad, x, w)
        return y

    return work


# ---- the command ----


def _table(problems: Sequence[Problem], times: Mapping[Problem, Times]) -> Iterator[str]:
    """Markdown: the choice for each; milliseconds where it was timed now."""
    yield "| problem | choice | ms | our best | torch's | torch's / choice |"
    yield "|---|---|---:|---:|---:|---:|"
    for problem in problems:
        name = name_of(conv_choice.choice(problem))
        cells = ["kept"] * 4
        if problem in times:
            all_times = times[problem]
            ours = [time for choice, time in all_times.items() if choice != TORCHS]
            torchs = all_times.get(TORCHS, math.nan)
            cells = [f"{t:.4f}" for t in (all_times[name], min(ours, default=math.nan), torchs)]
            cells.append(f"{torchs / all_times[name]:.2f}")
        yield f"| {problem} | {name} | " + " | ".join(cells) + " |"


@click.command(help=__doc__)
@click.option("--preset", required=True, help="A preset of python_train.run.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images at a time on the GPU.")
@click.option("--precision", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True)
@click.option("--list", "only_list", is_flag=True, help="Print the problems and what would be tried.")
@click.option("--again", is_flag=True, help="Time everything anew.")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Also write the choices to this file.")
def main(preset: str, batch: int, precision: str, only_list: bool, again: bool, save: Path | None) -> None:
    from python_train import UserError, plan  # the network whose convolutions these are; nothing else here needs it

    try:
        problems = with_alternatives(plan.convolutions_of_preset(preset, batch, precision))
    except UserError as error:
        raise click.ClickException(str(error)) from error
    if only_list:
        for problem in problems:
            click.echo(f"{problem}: " + ", ".join(map(name_of, offers(problem, GPU("H100", 132, wgmma=True)))))
        return
    if not torch.cuda.is_available():
        sys.exit("edm2ext.tune needs a GPU; --list says what it would try")
    if not available():
        sys.exit("the library has no convolutions for this GPU; see python -m edm2ext")
    torch.backends.cudnn.benchmark = True
    times = tune(problems, again=again)
    click.echo(f"{gpu_at_hand().name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    click.echo("\n".join(_table(problems, times)))
    click.echo(f"kept in {cache_file(gpu_at_hand().name)}")
    if save is not None:
        write(save, {problem: conv_choice.choice(problem) for problem in problems})


if __name__ == "__main__":
    main()
