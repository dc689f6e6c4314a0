"""Faults that no test can notice, with the reason."""

import fnmatch
import re
from pathlib import Path

from seeding import Mutant

_BRACKETS = r"\([^()]*(?:\([^()]*\)[^()]*)*\)"
# Name of the file, pattern that occurs in "line before => line after", why no test can notice.
UNNOTICEABLE: list[tuple[str, str, str]] = [
    (
        "launch.h",
        r"^if \(stream != counting_stream\(\)\) \{ => ",
        "shares out the work otherwise; counting would need a GPU",
    ),
    ("resample.h", r"kMostTaps = 128; => .*\(128 \+ 1\)", "filters have an even number of taps"),
    (
        "mp_conv2d_plan.h",
        r"\b(kSplits\[\]|k(Products|Bytes)PerCycle|kCyclesPer\w+) = |\b0\.3 \* ",
        "what a plan is expected to take: another is right as well",
    ),
    (
        "mp_conv2d_plan.h",
        r"^if \((splits > conv_product|cycles < least)\b.* => |\bint first = 0\b",
        "another plan is right as well",
    ),
    ("mp_conv2d_plan.h", r"^const int (rows|columns) = ", "tiles of Hopper's own instructions, which are not emulated"),
    ("mp_conv2d.h", r"kConvMostTaps = 25; => .*\(25 \+ 1\)", "no kernel of two odd sizes has 26 taps"),
    ("mp_conv2d.h", r"kConvMostPixels = .* => ", "so many pixels: more memory than a test has"),
    ("mp_conv2d.h", r"\bqkv\[3\] .* => .*qkv\[\(3 \+ 1\)\]", "one more pointer, which nothing reads"),
    ("sampler_step.cu", r"^const int inputs = ", "what is declared to be read is tested elsewhere"),
    ("rows.h", r"<= INT32_MAX.* => .*[a-z] < INT32_MAX", "a row, or rows, of 2^31 - 1: more memory than a test has"),
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
        "normalize_weight.cuh",
        r"^if \(groups\.lane == 0\) \*task\.grad_gain|^return team\.sum\(Floats<1>",
        "the sum over a warp is the same in all of its lanes; one more sum, of zeros, is not looked at",
    ),
    ("rows.cuh", r"^if \(rank % kWarpSize == 0\) partial", "the sum over a warp is the same in all of its lanes"),
    (
        "resample_down_pixel_norm.cuh",
        r"if \(groups\.lane != 0\) rms\[index\]",
        "the sum over a warp is the same in all of its lanes: any may store it",
    ),
    (
        "denoising_loss.cuh",
        r"^if \(groups\.lane [!=]= 0\) (squares\[.* => .*squares\[|continue; => )",
        "the sum over a warp is the same in all of its lanes: any may store it, and all",
    ),
    ("denoising_loss.cu", r"start\(denoising_loss_chunks<T, 1>\) : start", "one element at a time is right as well"),
    (
        "normalize_weight.cu",
        r"numel = t\.rows \* t\.row_size; => .*t\.rows \+ t\.row_size",
        "an empty tensor has no items; the traffic that is declared is tested elsewhere",
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
        "*",
        r"packs_per_lane (?:<= (\d+)\b.* => .*packs_per_lane <(= \(\1 - 1\)| \1\b)"
        r"|> (k\w+).* => .*packs_per_lane >= \3)"
        r"|head_dim <= kWarpSize \* N\b.* => .*head_dim < kWarpSize \* N\b",
        "rows of exactly so many packs are also right in the kernel for longer ones",
    ),
    (
        "launch.h",
        r"while \(lanes < packs .* => while \((\(lanes / 2\) < packs|lanes <= packs) ",
        "more lanes than packs: the others idle",
    ),
    (
        "*",
        r"(\S+) < (\S+) \? \1 : \2(.*) => .*\1 <= \2 \? \1 : \2\3$",
        "the smaller of equal numbers is either of them",
    ),
]


def why_unnoticeable(mutant: Mutant, text: str) -> str:
    """The reason listed for a mutant that no test can notice, or an empty string, as always for a planted one."""
    if mutant.operator == "planted":
        return ""
    name, change = Path(mutant.file).name, mutant.change(text)
    fitting = (why for file, what, why in UNNOTICEABLE if fnmatch.fnmatch(name, file) and re.search(what, change))
    return next(fitting, "")
