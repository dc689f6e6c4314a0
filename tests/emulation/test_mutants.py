"""Do the tests notice a wrong kernel? Faults are planted in a copy of the sources; each must be found."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import emulated
import mutate
import pytest
import test_emulated_accumulate_snapshots
import test_emulated_adam_step
import test_emulated_cosine_attention
import test_emulated_mp_conv2d
import test_emulated_mp_fourier
import test_emulated_mp_silu
import test_emulated_normalize_weight
import test_emulated_pixel_norm
import torch
from emulated import KernelFault, Library

KERNELS = emulated.ROOT / "csrc" / "cuda"
BARRIER = "__syncthreads();"


def planted(tmp_path: Path, file: str, change: Callable[[str], str]) -> Path:
    """A copy of the sources in which one file is changed; returns the root of the copy."""
    for part in ("cuda", "include", "torch"):
        shutil.copytree(emulated.ROOT / "csrc" / part, tmp_path / "csrc" / part)
    target = tmp_path / "csrc" / "cuda" / file
    original = target.read_text()
    target.write_text(change(original))
    assert target.read_text() != original
    return tmp_path


# ---- every barrier, removed ----


def barriers() -> list[tuple[str, int]]:
    """(file, number) of every barrier in the kernels."""
    files = sorted(KERNELS.glob("*.cuh"))
    return [(file.name, i) for file in files for i in range(file.read_text().count(BARRIER))]


def without_barrier(text: str, number: int) -> str:
    """The text without its barrier of that number."""
    pieces = text.split(BARRIER)
    return BARRIER.join(pieces[: number + 1]) + ";" + BARRIER.join(pieces[number + 1 :])


def check_pixel_norm(library: Library) -> None:
    for case in test_emulated_pixel_norm.CASES:
        if case.p >= 16 and case.p < 2000:
            test_emulated_pixel_norm.check(library, case, torch.float32)


def check_mp_silu(library: Library) -> None:
    for case in test_emulated_mp_silu.CASES:
        if case.c < 2000:
            test_emulated_mp_silu.check_modulated(library, case, torch.float32)


def check_normalize_weight(library: Library) -> None:
    cases = test_emulated_normalize_weight.CASES
    for out_dtype in (torch.float32, torch.float16):
        test_emulated_normalize_weight.check(library, cases, torch.float32, out_dtype, force=True, want_out=True)
    test_emulated_normalize_weight.check(library, cases, torch.float32, torch.float32, force=False, want_out=True)
    test_emulated_normalize_weight.check_backward(library, cases, torch.float32, torch.float32)


def check_mp_fourier(library: Library) -> None:
    for batch, channels in ((8, 33), (2, 2100)):
        test_emulated_mp_fourier.check(library, batch, channels, torch.float32)


def check_accumulate_snapshots(library: Library) -> None:
    for inputs, outputs, numel in ((33, 2, 300), (33, 2, 70 * 256)):
        test_emulated_accumulate_snapshots.check(library, [torch.float16] * inputs, outputs, numel)


def check_cosine_attention(library: Library) -> None:
    for case in test_emulated_cosine_attention.CASES:
        if "nchw" in case.layouts:
            test_emulated_cosine_attention.check(library, case._replace(layouts=("nchw",)), torch.float32)


def check_adam_step(library: Library) -> None:
    cases = test_emulated_adam_step.CASES
    test_emulated_adam_step.check(library, cases, effective=True, force=True)
    test_emulated_adam_step.check(library, cases, effective=False, force=False)


def check_mp_conv2d(library: Library) -> None:
    case = test_emulated_mp_conv2d.Case(1, 9, 8, 40, 72)
    test_emulated_mp_conv2d.check_exactly(library, case, test_emulated_mp_conv2d.Plan(3), (0,))


# File of kernels: the check that must fail without one of its barriers, and the library it is called with.
CHECKS = {
    "pixel_norm.cuh": (check_pixel_norm, "pixel_norm"),
    "mp_silu.cuh": (check_mp_silu, "mp_silu"),
    "normalize_weight.cuh": (check_normalize_weight, "normalize_weight"),
    "adam_step.cuh": (check_adam_step, "adam_step"),
    "rows.cuh": (check_normalize_weight, "normalize_weight"),
    "mp_conv2d.cuh": (check_mp_conv2d, "mp_conv2d"),
    "cosine_attention.cuh": (check_cosine_attention, "cosine_attention"),
    "mp_fourier.cuh": (check_mp_fourier, "mp_fourier"),
    "accumulate_snapshots.cuh": (check_accumulate_snapshots, "accumulate_snapshots"),
}


@pytest.mark.parametrize(("file", "number"), barriers())
def test_no_barrier_is_missed_unnoticed(tmp_path: Path, file: str, number: int):
    root = planted(tmp_path, file, lambda text: without_barrier(text, number))
    check, name = CHECKS[file]
    library = emulated.load(name, root)
    with pytest.raises((AssertionError, KernelFault)):
        check(library)


# ---- other faults, to be found by the test files of the kernels ----

# File, text that occurs in it, replacement.
FAULTS = [
    ("device.cuh", "offset = lanes / 2;", "offset = lanes / 4;"),
    ("device.cuh", "head < count ? head : count", "head"),
    ("device.cuh", "(count - head) / kPack<T>", "(count - head) / kPack<T> + 1"),
    ("device.cuh", "i < head; i += step", "i + 1 < head; i += step"),
    ("device.cuh", "(bytes_past_16(others) != past) || ...", "(bytes_past_16(others) != past) && ..."),
    ("device.cuh", "/ lanes - within_warp", "/ lanes"),
    ("pixel_norm.cuh", "eps + sqrtf(squares / channels)", "0 * eps + sqrtf(squares / channels)"),
    ("pixel_norm.cuh", "grad_y + grad_silu * mp_silu_grad(y)", "grad_y + grad_silu * y"),
    ("pixel_norm.cuh", "threadIdx.x % kLanes * N", "threadIdx.x % kLanes"),
    ("pixel_norm.cuh", "offset < kWarpSize; offset *= 2", "offset < kWarpSize / 2; offset *= 2"),
    ("pixel_norm.cuh", "int warp = 1; warp < kWarps", "int warp = 1; warp < kWarps - 1"),
    ("pixel_norm.cuh", "end = pixel < pixels ? channels : 0;\n  }", "end = channels;\n  }"),
    ("pixel_norm.cuh", "strip / strips * channels * pixels", "strip / strips * pixels"),
    ("pixel_norm.cu", "packs_per_lane <= 4", "packs_per_lane <= 5"),
    ("pixel_norm.cu", "packs_per_lane > kMostPacksPerLane", "false"),
    ("mp_silu.cuh", "end_pixel = (chunk + 1) * kChunkPixels<true>", "end_pixel = (chunk + 1) * kChunkPixels<true> - 1"),
    ("mp_silu.cuh", "if (end_pixel > pixels) end_pixel = pixels;", ""),
    ("mp_silu.cuh", "if (tile.first_channel + column >= channels) break;", ""),
    ("mp_silu.cuh", "partial[chunk * count + at] = value", "partial[0 * chunk * count + at] = value"),
    ("mp_silu.cuh", "int64_t chunk = 0; chunk < chunks", "int64_t chunk = 1; chunk < chunks"),
    ("mp_silu.cuh", "store(grad_x + own.begin + i, grad_z * scale)", "store(grad_x + own.begin + i, grad_z)"),
    ("mp_silu.cuh", "first / math::kPhiloxElements, subsequence", "first / 4, subsequence"),
    ("mp_silu.cuh", "start != group * N", "group != 0"),
    ("mp_silu.cuh", "half < threshold", "half <= threshold"),
    ("mp_silu.cuh", "bits.words[at / 2]", "bits.words[at % 4]"),
    ("mp_silu.cuh", "mask.of_neighbours(load<N>(grad_y + at), at)", "mask.of_neighbours(load<N>(grad_y + at), 0)"),
    ("mp_silu.cuh", "plane / channels * pixels", "plane * pixels"),
    ("mp_silu.cuh", "first + i * stride", "first + i"),
    ("mp_silu.cu", "chunks > 1 ? workspace : nullptr", "nullptr"),
    ("mp_silu.cu", "chunks == 1) return error;", "chunks <= 1) return error;"),
    ("adam_step.cuh", "g - g == 0.0f ? g : 0.0f", "g"),
    ("adam_step.cuh", "constants.bias_correction2 + table.eps", "constants.bias_correction2"),
    ("adam_step.cuh", "weight < 0.5f ? ema", "true ? ema"),
    ("adam_step.cuh", "task.row_dots[task.rows] = gain;", "task.row_dots[task.rows] = 0.0f;"),
    ("adam_step.cuh", "effective ? again : nonfinite", "nonfinite"),
    ("adam_step.cuh", "item == task.first_item && threadIdx.x == 0", "threadIdx.x == 0 && row == 1"),
    ("adam_step.cuh", "task.numel - at < task.row_size ? task.numel - at : task.row_size", "task.row_size"),
    ("adam_step.cuh", "int k = at_once; k < table.profiles", "int k = at_once + 1; k < table.profiles"),
    ("adam_step.cu", "pointers_ + count > AdamTable::kPointers", "pointers_ > AdamTable::kPointers"),
    ("adam_step.cu", "quads = quads && all_aligned(t.emas[k])", "quads = quads"),
    ("rows.cuh", "offset = kWarpSize / 2; offset > 0", "offset = kWarpSize / 4; offset > 0"),
    ("rows.cuh", "int warp = 1; warp < kWarps; ++warp) values", "int warp = 2; warp < kWarps; ++warp) values"),
    ("rows.cuh", "partial[sums++]", "partial[sums]"),
    ("rows.cuh", "number(middle) <= value", "number(middle) < value"),
    ("rows.cuh", "i % outer * inner + i / outer", "i % inner * inner + i / inner"),
    ("rows.cuh", "if (needed > capacity) return nullptr;", ""),
    ("rows.cuh", "+ team.index * floats * kShortRow", "+ team.index * kShortRow"),
    ("rows.cuh", "elements * (dtype == DType::kFloat32 ? 4 : 2)", "elements * 4"),
    ("rows.cuh", "first += kBatch * step", "first += step"),
    ("rows.h", "row_size > kShortRow ? rows : ceil_div(rows, kWarps)", "ceil_div(rows, kWarps)"),
    ("rows.h", "std::max<int64_t>(longest, kShortRow * kWarps)", "longest"),
    ("normalize_weight.cuh", "table.force ? table.eps + norm.rms / norm.s : norm.s", "norm.s"),
    ("normalize_weight.cuh", "if (table.force) team.sync();", ""),
    ("normalize_weight.cuh", "if (transposed && held != nullptr) store(held + i, x);", ""),
    ("normalize_weight.cuh", "n / task.inner % kQuad == 0", "true"),
    ("normalize_weight.cuh", "if (row < task.rows) normalize_row(", "normalize_row("),
    ("normalize_weight.cuh", "held_w + (n > kShortRow ? n : kShortRow)", "held_w + kShortRow"),
    ("normalize_weight.cuh", "task.row_dots[row] = gradient.dot", "task.row_dots[row] = gradient.of_w"),
    ("rows.cuh", "i < count; i += kWarpSize", "i < kWarpSize && i < count; i += kWarpSize"),
    ("normalize_weight.cu", "t.row_size % kQuad == 0 && quad_aligned(t.w, params.dtype)", "t.row_size % kQuad == 0"),
    ("ema_update.cuh", "first_chunk[middle] <= chunk", "first_chunk[middle] < chunk"),
    ("ema_update.cuh", "weight < 0.5f ?", "true ?"),
    ("ema_update.cuh", "bytes_past_16(pointers[profile]) != bytes_past_16(pointers[0])", "false"),
    ("ema_update.cu", "table.weights[k - first]", "table.weights[0]"),
    ("ema_update.cu", "table.tensors < capacity", "table.tensors <= capacity"),
    ("resample.cuh", "2 * column + 1 < grid.fine_width", "true"),
    ("resample.cuh", "2 * row + 1 < grid.fine_height", "true"),
    ("resample.cuh", "row < grid.coarse_height && column", "column"),
    ("resample.cuh", "row < grid.coarse_height && column < grid.coarse_width", "row < grid.coarse_height"),
    ("resample.cuh", "load<N>(x + N + cell.below)", "load<N>(x + cell.below)"),
    ("resample.cuh", "values.v[N / 2 + i / 2]", "values.v[i / 2]"),
    ("resample.cuh", "item % items.packs * N", "item % items.packs"),
    ("resample.cuh", "Floats<N> values = {};", "Floats<N> values = {{1}};"),
    ("resample.cuh", "2 * out - half", "2 * out - half + 1"),
    ("resample.cuh", "static_cast<int>(origin % 2)", "static_cast<int>(out % 2)"),
    ("resample.cuh", "column < 0 || column >= sizes.width", "column >= sizes.width"),
    ("resample.cuh", "row < 0 || row >= sizes.height", "row < 0"),
    ("resample.cuh", "row_sum * taps.tap[ky]", "row_sum * taps.tap[0]"),
    ("resample.cu", "ceil_div(grid.fine_height, 2)", "grid.coarse_height"),
    ("resample.cu", "params.filter[0] == params.filter[1]", "true"),
    ("resample.cu", "params.filter[0] * params.filter[0]", "params.filter[0]"),
    ("resample.cu", "grid.fine_width == 2 * grid.coarse_width", "true"),
    ("resample.cu", "params.taps > kMostTaps", "false"),
    (
        "resample_down_pixel_norm.cuh",
        "Cell(grid, row / rows, row % rows, index % columns)",
        "Cell(grid, 0, row, index % columns)",
    ),
    ("resample_down_pixel_norm.cuh", "normalize_grad_coef(dot_gy, 1.0f", "normalize_grad_coef(dot_gy, 0.5f"),
    (
        "resample_down_pixel_norm.cuh",
        "cell.has_coarse && end > 0 ? rms[cell.coarse / channels]",
        "end > 0 ? rms[cell.coarse / channels]",
    ),
    ("resample_down_pixel_norm.cuh", "if (groups.lane == 0 && index < cells)", "if (groups.lane == 0)"),
    ("resample_down_pixel_norm.cuh", "const int end = index < cells ? channels : 0;", "const int end = channels;"),
    ("resample_down_pixel_norm.cuh", "    if (cell.has_coarse) {\n#pragma unroll", "    {\n#pragma unroll"),
    ("resample_down_pixel_norm.cuh", "const int64_t end = cell.has_coarse ? grid.inner : 0;", "const int64_t end = 0;"),
    ("resample_down_pixel_norm.cuh", "cell.has_coarse && strip.end > 0", "strip.end > 0"),
    ("resample_down_pixel_norm.cuh", "if (strip.first == 0 && strip.end > 0) {", "if (strip.first == 0) {"),
    ("resample_down_pixel_norm.cuh", "rms_at = sample * coarse_plane", "rms_at = sample * channels * coarse_plane"),
    ("resample_down_pixel_norm.cu", "all_cells ? ceil_div(params.height, 2) : params.height / 2", "params.height / 2"),
    ("resample_down_pixel_norm.cu", "grid.fine_width == 2 * grid.coarse_width", "true"),
    ("resample_down_pixel_norm.cu", "packs_per_lane > kMostPacksPerLane", "false"),
    ("resample_down_pixel_norm.cu", "packs_per_lane <= 2", "packs_per_lane <= 3"),
    ("cosine_attention.cuh", "parts[at % 3].v[at / 3] = values", "parts[at / N].v[at % N] = values"),
    ("cosine_attention.cuh", "values.v[i] = parts[at % 3]", "values.v[i] = parts[2 - at % 3]"),
    ("cosine_attention.cuh", "row < rows && channel < head_dim", "row < rows"),
    ("cosine_attention.cuh", "row < rows && channel < head_dim", "channel < head_dim"),
    ("cosine_attention.cuh", "dot_gx[j] += to_float", "dot_gx[0] += to_float"),
    ("cosine_attention.cuh", "index / 3 % strips", "index / 3"),
    ("cosine_attention.cuh", "head / heads * pixels", "head * pixels"),
    ("cosine_attention.cuh", "+ head % heads * head_dim", ""),
    ("cosine_attention.cuh", "if (this->end > 0) this->end = head_dim;", "this->end = head_dim;"),
    ("cosine_attention.cuh", "left < kChannels ? left : kChannels", "kChannels"),
    ("cosine_attention.cuh", "if (first_pixel + pixel < pixels) body", "body"),
    ("cosine_attention.cuh", "past < this->end ? past : this->end", "this->end"),
    ("cosine_attention.cu", "head_dim % N == 0 && all_aligned(qkv", "all_aligned(qkv"),
    ("cosine_attention.cu", "head_dim % N == 0 && all_aligned(grads", "all_aligned(grads"),
    ("cosine_attention.cu", "packs && pixels % N == 0", "packs"),
    ("cosine_attention.cu", "packs && head_dim <= kWarpSize * N", "packs"),
    ("mp_sum.cuh", "y >= -clip && y <= clip", "y > -clip && y < clip"),
    ("mp_sum.cuh", "y >= -clip && y <= clip ? g : 0.0f", "y >= -clip && y <= clip ? g : 0.0f * g"),
    ("mp_sum.cuh", "elements_to_boundary(numel, grad_y, a, b, grad_a, grad_b)", "elements_to_boundary(numel, grad_y)"),
    ("mp_sum.cu", "std::isinf(params.clip)", "false"),
    ("mp_cat.cuh", "row_ += step_rows_;", "row_ += step_rows_ + 1;"),
    ("mp_cat.cuh", "(row_ + 1) * size_a_", "row_ * size_a_"),
    ("mp_cat.cuh", "rounded<T>(load<N>(part + walk.unit_of_part() * N) * weight)", "load<N>(part) * weight"),
    ("mp_cat.cu", "size_b % kPack<T> == 0 && ", ""),
    ("mp_cat.cu", "all_aligned(pointers...)", "(all_aligned(pointers...) || true)"),
    ("mp_conv2d.cuh", "  await_copies<Tile::kStages - 2>();\n  __syncthreads();", "__syncthreads();"),
    ("mp_conv2d.cuh", "  await_copies<Tile::kStages - 2>();\n        __syncthreads();", "__syncthreads();"),
    ("mp_conv2d.cuh", "await_copies<Tile::kStages - 2>", "await_copies<Tile::kStages - 1>"),
    ("mp_conv2d.cuh", "    commit_copies();\n    ++copied;", "    ++copied;"),
    ("mp_conv2d.cuh", "    __syncwarp();\n#pragma unroll", "#pragma unroll"),
    ("mp_conv2d.cuh", "    __syncwarp();\n  }\n}", "  }\n}"),
    ("mp_conv2d.cuh", "copy_stage + 1 < Tile::kStages ?", "copy_stage + 2 < Tile::kStages ?"),
    ("mp_conv2d.cuh", "is_channel && (inside_[i] >> tap & 1) != 0", "is_channel"),
    ("mp_conv2d.cuh", "is_channel && (inside_[i] >> tap & 1) != 0", "(inside_[i] >> tap & 1) != 0"),
    ("mp_conv2d.cuh", "is_channel && out_ + i * Share::kRowStep < sizes.out", "out_ + i * Share::kRowStep < sizes.out"),
    ("mp_conv2d.cuh", "kernel_width - 1 - step.tap(sizes)", "kernel_width - 1 - 0 * step.tap(sizes)"),
    ("mp_conv2d.cuh", "is_out && in_ + ahead", "in_ + ahead"),
    ("mp_conv2d.cuh", "pixel < sizes.pixels && out_", "out_"),
    ("mp_conv2d.cuh", "pixel < sizes.pixels && is_inside", "is_inside"),
    ("mp_conv2d.cuh", "channel += kConvDepth;", "channel += kConvDepth / 2;"),
    ("mp_conv2d.cuh", "(part + 1) % kParts * 16", "0"),
    ("mp_conv2d.cuh", "at_row >= args.rows || ", ""),
    ("mp_conv2d.cuh", "int64_t{args.steps} * (split + 1) / args.splits", "args.steps"),
    ("mp_conv2d.cuh", "for (int split = 0; split < args.splits", "for (int split = 1; split < args.splits"),
    ("mp_conv2d.cuh", "const int64_t sample = divide(row, output.by_pixels)", "const int64_t sample = 0"),
    ("mp_conv2d.cu", "plan.splits > std::max<int64_t>(product.steps, 1)", "false"),
    ("mp_fourier.cuh", "kLimit = 0x1p48", "kLimit = 0x1p500"),
    (
        "mp_fourier.cuh",
        "::fma(-k, 6.12323399573676604e-17, ::fma(-k, 1.57079632679489656, angle))",
        "angle - k * 1.57079633",
    ),
    ("mp_fourier.cuh", " + static_cast<float>(given - given)", ""),
    ("mp_fourier.cuh", "threadIdx.y == 0 && channel < channels", "threadIdx.y == 0"),
    ("accumulate_snapshots.cuh", " && reinterpret_cast<uintptr_t>(source) % sizeof(elements) == 0", ""),
    ("accumulate_snapshots.cuh", "(value.v[i] - (sum - added)) + (product - added)", "product - added"),
    ("accumulate_snapshots.cuh", "fmaf(coef[1], x.v[i], fmaf(coef[0], x.v[i], -product))", "coef[1] * x.v[i]"),
    ("accumulate_snapshots.cuh", "sum - sum == 0.0f ? sum + lost : sum", "sum + lost"),
    ("accumulate_snapshots.cuh", "first += rows * kOutputs", "first += kOutputs"),
    ("accumulate_snapshots.cuh", "m * table.row_stride", "m * table.numel"),
    ("accumulate_snapshots.cu", "params.coefs[n * params.num_outputs + m]", "params.coefs[m * params.num_inputs + n]"),
    ("accumulate_snapshots.cu", "params.out + part.first_output * params.row_stride", "params.out"),
    ("image.cuh", "first - outer * inner", "first"),
    ("image.cuh", "if (++within == inner) {", "if (++within > inner) {"),
    (
        "image.cuh",
        "pixel * channels + channel : channel * pixels + pixel",
        "channel * pixels + pixel : channel * pixels + pixel",
    ),
    ("image.cuh", "(i - sample * units) * N", "(i - sample * units)"),
    ("precondition.cuh", "channel < image.channels", "true"),
    (
        "precondition.cuh",
        "input ? math::c_in(sigma, sigma_data) : math::c_out",
        "input ? math::c_out(sigma, sigma_data) : math::c_out",
    ),
    ("precondition.cuh", "sigmas[sigma_per_sample ? unit.sample : 0]", "sigmas[unit.sample]"),
    ("precondition.cu", "to.numel() % kPack<T> == 0 && ", ""),
    ("precondition.cu", "image.numel() % kWidth == 0 && ", ""),
    ("precondition.cu", " && all_aligned(params.x, params.out)", ""),
    ("denoising_loss.cuh", "2.0f * scale", "scale"),
    ("denoising_loss.cuh", "::exp(-u)", "::exp(u)"),
    ("denoising_loss.cuh", "expf(-us[sample])", "expf(us[sample])"),
    ("denoising_loss.cuh", "left < kLossChunk ? left : kLossChunk", "kLossChunk"),
    ("denoising_loss.cuh", "if (threadIdx.x == 0) squares", "if (threadIdx.x == 1) squares"),
    ("denoising_loss.cuh", "count - total", "count + total"),
    ("denoising_loss.cu", "raw.numel() % kPack<T> == 0 && ", ""),
    (
        "sampler_step.cuh",
        "math::sampler_step(k, x.v[i], denoised.v[i], guide.v[i], start.v[i])",
        "math::sampler_step(k, x.v[i], denoised.v[i], guide.v[i], x.v[i])",
    ),
    ("sampler_step.cuh", "if (channel == 0) ", ""),
    (
        "sampler_step.cu",
        "params.guide, params.start, params.noise, params.out);",
        "params.guide, params.start, params.out);",
    ),
    ("accumulate_snapshots.cu", "Large::kCoefs / (kParts * part.num_inputs)", "Large::kCoefs / part.num_inputs"),
]
_OPS = ("pixel_norm", "mp_silu", "mp_sum", "mp_cat", "mp_fourier", "resample", "resample_down_pixel_norm")
_OPS += ("cosine_attention", "ema_update", "adam_step", "normalize_weight", "accumulate_snapshots")
_OPS += ("mp_conv2d", "precondition", "denoising_loss", "sampler_step")
# Whose tests run: those of all ops, unless the file is an op's own or listed here.
_USERS = {
    **{name: (name,) for name in _OPS},
    "rows": ("normalize_weight", "adam_step"),
    "image": ("precondition", "denoising_loss", "sampler_step"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("file", "text", "replacement"), FAULTS)
def test_fault_is_found(tmp_path: Path, file: str, text: str, replacement: str):
    root = planted(tmp_path, file, lambda source: source.replace(text, replacement))
    names = _USERS.get(Path(file).stem, _OPS)
    for name in names:
        emulated.build(name, root=root)  # a fault that does not compile would prove nothing
    files = [f"{emulated.HERE}/test_emulated_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "EDM2EXT_EMULATED_SOURCES": str(root)}
    run = subprocess.run(command, env=environment, cwd=emulated.ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0, "all tests passed"


# ---- faults seeded by mutate.py ----


SOURCE = """
template <int N>
__global__ void f(float* x, int64_t count) {  // i < count
  for (int64_t i = threadIdx.x; i < count; i += step) x[i] *= 2;
  if (count > most) count = most;
  __syncthreads();  // before x is read
  const float half = x[0] / 2;
  const Traffic traffic{2 * bytes, bytes};
}
"""


def test_what_is_seeded():
    changes = [(m.operator, m.change(SOURCE).split(" => ")[1]) for m in mutate.mutants("f.cuh", SOURCE)]
    assert changes[0] == ("barrier", "; // before x is read")
    assert {operator for operator, _ in changes[1:]} == {
        *("bound", "arithmetic", "accumulation", "stride", "index", "condition", "constant", "rounding", "dropped")
    }
    assert ("bound", "for (int64_t i = threadIdx.x; i <= count; i += step) x[i] *= 2;") in changes
    assert ("rounding", "const float half = __bfloat162float(__float2bfloat16_rn(x[0] / 2));") in changes
    assert not [change for _, change in changes if "raffic" in change or "i <= count)" in change or ">=" in change]


def run_mutate(*arguments: str) -> str:
    """Runs mutate.py, in a process that has not loaded any kernels; returns what it printed."""
    command = [sys.executable, f"{emulated.HERE}/mutate.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    return run.stdout


def test_one_seeded_fault_in_every_kernel_file():
    """A quick look that the tests of every family notice something; the test below looks closer, mutate.py at all."""
    table = run_mutate(
        "--only", ".cuh", "--operators", "index", "dropped", "--per-file", "1", "--quick", "--at-least", "0.8"
    )
    assert all(f"| csrc/cuda/{file.name} |" in table for file in KERNELS.glob("*.cuh"))


@pytest.mark.slow
def test_seeded_faults():
    run_mutate("--per-file", "4", "--at-least", "0.9")
