// Means over cells of 2 x 2 pixels, their pixel norm y = m / (eps + rms(m)) and MP-SiLU of it in one pass, and the
// backward in one: the gradient of the mean m (spec 2.1, with x = m) is g / s - y <g, y> / (n rms), for which y and rms
// suffice, and each pixel of the cell gets a quarter of it.
//
// channels_last: a group of lanes owns one cell and keeps its channels in registers (rows); cells of too many channels,
// or not made of 16-byte packs, are read once per step by a warp (long_rows). contiguous: a block owns a strip of
// neighbouring cells, its threads share out the channels (planes).
#pragma once

#include "pixel_norm.cuh"
#include "resample.cuh"

namespace edm2::cuda {

/// Rows and columns of cells: the coarse image, or, with those that hold the last row or column of an odd fine image,
/// all of them.
struct CellRange {
  int64_t rows;
  int64_t columns;

  __device__ Cell cell(const CellGrid& grid, int64_t index) const {
    const int64_t row = index / columns;
    return Cell(grid, row / rows, row % rows, index % columns);
  }
};

/// Factors in the gradient of a cell's mean: g * inverse_scale - y * projection.
struct MeanGradient {
  float inverse_scale;
  float projection;

  __device__ MeanGradient(float rms, float dot_gy, float channels, float eps)
      : inverse_scale(math::divide(1.0f, eps + rms)),
        projection(math::normalize_grad_coef(dot_gy, 1.0f, rms, channels)) {}
};

/// channels_last; a cell's channels are up to kPacks packs in each of `lanes` lanes.
template <typename T, int kPacks>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<2 * kPacks>)
    resample_down_pixel_norm_rows(const T* __restrict__ x, T* __restrict__ y, T* __restrict__ y_silu,
                                  float* __restrict__ rms, CellGrid grid, CellRange range, int64_t cells, int lanes,
                                  float eps) {
  constexpr int N = kPack<T>;
  const int channels = static_cast<int>(grid.inner);
  const LaneGroups groups(lanes);
  for (int64_t first = groups.first; first < cells; first += groups.step) {
    const int64_t index = first + groups.within_warp;
    const Cell cell = range.cell(grid, index);
    const int end = index < cells ? channels : 0;
    Floats<N> means[kPacks];
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = (groups.lane + k * lanes) * N;
      if (c >= end) continue;
      means[k] = sum_over_cell<N, false>(x + cell.fine + c, cell) * 0.25f;
      squares += sum(means[k] * means[k]);
    }
    const float own_rms = sqrtf(sum_over_lanes(squares, lanes) / static_cast<float>(channels));
    const float inverse_scale = math::divide(1.0f, eps + own_rms);
    if (groups.lane == 0 && index < cells) rms[index] = own_rms;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = (groups.lane + k * lanes) * N;
      if (c < end) store_with_silu(y, y_silu, cell.coarse + c, means[k] * inverse_scale);
    }
  }
}

/// `cells` are all cells, `range` too; rms is [outer, coarse_height, coarse_width].
template <typename T, int kPacks>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<3 * kPacks>)
    resample_down_pixel_norm_backward_rows(const T* __restrict__ grad_y, const T* __restrict__ grad_silu,
                                           const T* __restrict__ y, const float* __restrict__ rms,
                                           T* __restrict__ grad_x, CellGrid grid, CellRange range, int64_t cells,
                                           int lanes, float eps) {
  constexpr int N = kPack<T>;
  const int channels = static_cast<int>(grid.inner);
  const LaneGroups groups(lanes);
  for (int64_t first = groups.first; first < cells; first += groups.step) {
    const int64_t index = first + groups.within_warp;
    const Cell cell = range.cell(grid, index);
    const int end = index < cells ? channels : 0;
    Packed<T, N> held_y[kPacks] = {};
    Floats<N> gradient[kPacks] = {};
    float dot_gy = 0.0f;
    if (cell.has_coarse) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int c = (groups.lane + k * lanes) * N;
        if (c >= end) continue;
        const int64_t at = cell.coarse + c;
        held_y[k] = Packed<T, N>::load(y + at);
        gradient[k] = gradient_of_y<true>(load<N>(grad_y + at), load<N>(grad_silu + at), unpack(held_y[k]));
        dot_gy += sum(gradient[k] * unpack(held_y[k]));
      }
    }
    dot_gy = sum_over_lanes(dot_gy, lanes);
    const float own_rms = cell.has_coarse && end > 0 ? rms[cell.coarse / channels] : 1.0f;
    const MeanGradient mean(own_rms, dot_gy, static_cast<float>(channels), eps);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = (groups.lane + k * lanes) * N;
      if (c >= end) continue;
      const auto grad_mean = gradient[k] * mean.inverse_scale - unpack(held_y[k]) * mean.projection;
      spread_over_cell<N, false>(grad_x + cell.fine + c, cell, grad_mean * 0.25f);
    }
  }
}

/// channels_last, any number of channels: a warp per cell. N = 1 fits any alignment.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    resample_down_pixel_norm_long_rows(const T* __restrict__ x, T* __restrict__ y, T* __restrict__ y_silu,
                                       float* __restrict__ rms, CellGrid grid, CellRange range, int64_t cells,
                                       float eps) {
  const LaneGroups groups(kWarpSize);
  for (int64_t index = groups.first; index < cells; index += groups.step) {
    const Cell cell = range.cell(grid, index);
    float squares = 0.0f;
    for (int64_t c = groups.lane * N; c < grid.inner; c += kWarpSize * N) {
      const auto mean = sum_over_cell<N, false>(x + cell.fine + c, cell) * 0.25f;
      squares += sum(mean * mean);
    }
    const float own_rms = sqrtf(sum_over_lanes(squares, kWarpSize) / static_cast<float>(grid.inner));
    const float inverse_scale = math::divide(1.0f, eps + own_rms);
    if (groups.lane == 0) rms[index] = own_rms;
    for (int64_t c = groups.lane * N; c < grid.inner; c += kWarpSize * N) {
      const auto mean = sum_over_cell<N, false>(x + cell.fine + c, cell) * 0.25f;
      store_with_silu(y, y_silu, cell.coarse + c, mean * inverse_scale);
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    resample_down_pixel_norm_backward_long_rows(const T* __restrict__ grad_y, const T* __restrict__ grad_silu,
                                                const T* __restrict__ y, const float* __restrict__ rms,
                                                T* __restrict__ grad_x, CellGrid grid, CellRange range, int64_t cells,
                                                float eps) {
  const LaneGroups groups(kWarpSize);
  for (int64_t index = groups.first; index < cells; index += groups.step) {
    const Cell cell = range.cell(grid, index);
    const int64_t end = cell.has_coarse ? grid.inner : 0;
    const auto gradient = [&](int64_t at) {
      return gradient_of_y<true>(load<N>(grad_y + at), load<N>(grad_silu + at), load<N>(y + at));
    };
    float dot_gy = 0.0f;
    for (int64_t c = groups.lane * N; c < end; c += kWarpSize * N) {
      dot_gy += sum(gradient(cell.coarse + c) * load<N>(y + cell.coarse + c));
    }
    dot_gy = sum_over_lanes(dot_gy, kWarpSize);
    const MeanGradient mean(cell.has_coarse ? rms[cell.coarse / grid.inner] : 1.0f, dot_gy,
                            static_cast<float>(grid.inner), eps);
    for (int64_t c = groups.lane * N; c < grid.inner; c += kWarpSize * N) {
      Floats<N> grad_mean = {};
      if (cell.has_coarse) {
        const int64_t at = cell.coarse + c;
        grad_mean = gradient(at) * mean.inverse_scale - load<N>(y + at) * mean.projection;
      }
      spread_over_cell<N, false>(grad_x + cell.fine + c, cell, grad_mean * 0.25f);
    }
  }
}

/// contiguous: a strip of cells of one sample, N neighbours of one row for each thread; N = 1 fits any sizes.
template <int N>
struct CellStrip : PixelStrip<N> {
  Cell cell;          // the thread's first, within a plane
  int64_t fine_base;  // offsets of the thread's first pixels in channel 0
  int64_t coarse_base;
  int64_t fine_plane;
  int64_t coarse_plane;
  int64_t rms_at;

  /// `grid` has planes for outer; `range` says which cells.
  __device__ CellStrip(int64_t strip, const CellGrid& grid, const CellRange& range, int64_t channels)
      : PixelStrip<N>(strip, channels, range.rows * range.columns),
        cell(grid, 0, own_cell(strip, range) / range.columns, own_cell(strip, range) % range.columns),
        fine_plane(grid.fine_height * grid.fine_width),
        coarse_plane(grid.coarse_height * grid.coarse_width) {
    const int64_t sample = strip / strips(range);
    fine_base = sample * channels * fine_plane + cell.fine;
    coarse_base = sample * channels * coarse_plane + cell.coarse;
    rms_at = sample * coarse_plane + cell.coarse;
  }

  __device__ static int64_t strips(const CellRange& range) {
    return (range.rows * range.columns + PixelStrip<N>::kPixels - 1) / PixelStrip<N>::kPixels;
  }

  __device__ static int64_t own_cell(int64_t strip, const CellRange& range) {
    return strip % strips(range) * PixelStrip<N>::kPixels + threadIdx.x % PixelStrip<N>::kLanes * N;
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    resample_down_pixel_norm_planes(const T* __restrict__ x, T* __restrict__ y, T* __restrict__ y_silu,
                                    float* __restrict__ rms, CellGrid grid, CellRange range, int64_t strips,
                                    int64_t channels, float eps) {
  using Strip = CellStrip<N>;
  const float n = static_cast<float>(channels);
  for (int64_t s = blockIdx.x; s < strips; s += gridDim.x) {
    const Strip strip(s, grid, range, channels);
    const auto mean = [&](int64_t c) {
      return sum_over_cell<N, (N > 1)>(x + strip.fine_base + c * strip.fine_plane, strip.cell) * 0.25f;
    };
    Floats<N> squares = {};
#pragma unroll 2
    for (int64_t c = strip.first; c < strip.end; c += Strip::kSlices) {
      const auto here = mean(c);
      squares = squares + here * here;
    }
    const auto own_rms = map([=](float v) { return sqrtf(v / n); }, sum_over_slices(squares));
    const auto inverse_scale = map([=](float v) { return math::divide(1.0f, eps + v); }, own_rms);
    if (strip.first == 0 && strip.end > 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) rms[strip.rms_at + i] = own_rms.v[i];
    }
#pragma unroll 2
    for (int64_t c = strip.first; c < strip.end; c += Strip::kSlices) {
      store_with_silu(y, y_silu, strip.coarse_base + c * strip.coarse_plane, mean(c) * inverse_scale);
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<12>)
    resample_down_pixel_norm_backward_planes(const T* __restrict__ grad_y, const T* __restrict__ grad_silu,
                                             const T* __restrict__ y, const float* __restrict__ rms,
                                             T* __restrict__ grad_x, CellGrid grid, CellRange range, int64_t strips,
                                             int64_t channels, float eps) {
  using Strip = CellStrip<N>;
  const float n = static_cast<float>(channels);
  for (int64_t s = blockIdx.x; s < strips; s += gridDim.x) {
    const Strip strip(s, grid, range, channels);
    const bool inside = strip.cell.has_coarse && strip.end > 0;
    const auto gradient = [&](int64_t at) {
      return gradient_of_y<true>(load<N>(grad_y + at), load<N>(grad_silu + at), load<N>(y + at));
    };
    Floats<N> dot_gy = {};
#pragma unroll 2
    for (int64_t c = strip.first; inside && c < strip.end; c += Strip::kSlices) {
      const int64_t at = strip.coarse_base + c * strip.coarse_plane;
      dot_gy = dot_gy + gradient(at) * load<N>(y + at);
    }
    dot_gy = sum_over_slices(dot_gy);
    Floats<N> inverse_scale = {};
    Floats<N> projection = {};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const MeanGradient mean(inside ? rms[strip.rms_at + i] : 1.0f, dot_gy.v[i], n, eps);
      inverse_scale.v[i] = mean.inverse_scale;
      projection.v[i] = mean.projection;
    }
#pragma unroll 2
    for (int64_t c = strip.first; c < strip.end; c += Strip::kSlices) {
      Floats<N> grad_mean = {};
      if (inside) {
        const int64_t at = strip.coarse_base + c * strip.coarse_plane;
        grad_mean = gradient(at) * inverse_scale - load<N>(y + at) * projection;
      }
      spread_over_cell<N, (N > 1)>(grad_x + strip.fine_base + c * strip.fine_plane, strip.cell, grad_mean * 0.25f);
    }
  }
}

}  // namespace edm2::cuda
