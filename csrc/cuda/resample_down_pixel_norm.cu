#include "edm2/resample_down_pixel_norm.h"

#include "launch.h"
#include "resample_down_pixel_norm.cuh"

namespace edm2::cuda {
namespace {

/// Sizes, counted in cells.
struct Plan {
  CellGrid grid;
  CellRange range;
  int64_t cells;
  int64_t fine_numel;  // of the pixels that have a coarse one
  int64_t coarse_numel;

  template <typename Params>
  Plan(const Params& params, bool all_cells)
      : grid{params.channels_last ? params.batch : params.batch * params.channels,
             params.channels_last ? params.channels : 1,
             params.height,
             params.width,
             params.height / 2,
             params.width / 2},
        range{all_cells ? ceil_div(params.height, 2) : params.height / 2,
              all_cells ? ceil_div(params.width, 2) : params.width / 2},
        cells(params.batch * range.rows * range.columns),
        fine_numel(4 * params.batch * params.channels * grid.coarse_height * grid.coarse_width),
        coarse_numel(params.batch * params.channels * grid.coarse_height * grid.coarse_width) {}

  int64_t rms_bytes(int64_t channels) const { return coarse_numel / channels * 4; }

  /// Whether rows of cells are made of N neighbours each.
  bool pairs(int n) const { return grid.coarse_width % n == 0 && grid.fine_width == 2 * grid.coarse_width; }

  template <int N>
  int64_t strips(int64_t batch) const {
    return batch * ceil_div(range.rows * range.columns, PixelStrip<N>::kPixels);
  }
};

template <typename T>
cudaError_t forward(const ResampleDownPixelNormParams& params, cudaStream_t stream) {
  constexpr int N = kPack<T>;
  const auto* x = static_cast<const T*>(params.x);
  auto* y = static_cast<T*>(params.y);
  auto* y_silu = static_cast<T*>(params.y_silu);
  auto* rms = static_cast<float*>(params.rms);
  const int64_t channels = params.channels;
  const auto eps = static_cast<float>(params.eps);
  const Plan plan(params, false);
  if (plan.coarse_numel == 0) return cudaSuccess;
  const int64_t size = sizeof(T);
  const Traffic traffic{plan.fine_numel * size, 2 * plan.coarse_numel * size + plan.rms_bytes(channels)};
  const bool aligned = all_aligned(x, y, y_silu);

  if (!params.channels_last) {
    if (aligned && plan.pairs(N)) {
      const int64_t strips = plan.strips<N>(params.batch);
      return launch(resample_down_pixel_norm_planes<T, N>, strips, kThreads, stream, traffic, x, y, y_silu, rms,
                    plan.grid, plan.range, strips, channels, eps);
    }
    const int64_t strips = plan.strips<1>(params.batch);
    return launch(resample_down_pixel_norm_planes<T, 1>, strips, kThreads, stream, traffic, x, y, y_silu, rms,
                  plan.grid, plan.range, strips, channels, eps);
  }

  const int lanes = lanes_for(channels / N);
  const int64_t packs_per_lane = ceil_div(channels / N, lanes);
  if (!aligned || channels % N != 0) {
    return launch(resample_down_pixel_norm_long_rows<T, 1>, ceil_div(plan.cells * kWarpSize, kThreads), kThreads,
                  stream, traffic, x, y, y_silu, rms, plan.grid, plan.range, plan.cells, eps);
  }
  if (packs_per_lane > kMostPacksPerLane) {
    return launch(resample_down_pixel_norm_long_rows<T, N>, ceil_div(plan.cells * kWarpSize, kThreads), kThreads,
                  stream, traffic, x, y, y_silu, rms, plan.grid, plan.range, plan.cells, eps);
  }
  return dispatch_packs(packs_per_lane, [&](auto packs) {
    return launch(resample_down_pixel_norm_rows<T, packs>, ceil_div(plan.cells * lanes, kThreads), kThreads, stream,
                  traffic, x, y, y_silu, rms, plan.grid, plan.range, plan.cells, lanes, eps);
  });
}

template <typename T>
cudaError_t backward(const ResampleDownPixelNormBackwardParams& params, cudaStream_t stream) {
  constexpr int N = kPack<T>;
  const auto* grad_y = static_cast<const T*>(params.grad_y);
  const auto* grad_silu = static_cast<const T*>(params.grad_silu);
  const auto* y = static_cast<const T*>(params.y);
  const auto* rms = static_cast<const float*>(params.rms);
  auto* grad_x = static_cast<T*>(params.grad_x);
  const int64_t channels = params.channels;
  const auto eps = static_cast<float>(params.eps);
  const Plan plan(params, true);
  const int64_t numel = params.batch * channels * params.height * params.width;
  if (numel == 0) return cudaSuccess;
  const int64_t size = sizeof(T);
  const Traffic traffic{3 * plan.coarse_numel * size + plan.rms_bytes(channels), numel * size};
  const bool aligned = all_aligned(grad_y, grad_silu, y, grad_x);

  if (!params.channels_last) {
    if (aligned && plan.pairs(N)) {
      const int64_t strips = plan.strips<N>(params.batch);
      return launch(resample_down_pixel_norm_backward_planes<T, N>, strips, kThreads, stream, traffic, grad_y,
                    grad_silu, y, rms, grad_x, plan.grid, plan.range, strips, channels, eps);
    }
    const int64_t strips = plan.strips<1>(params.batch);
    return launch(resample_down_pixel_norm_backward_planes<T, 1>, strips, kThreads, stream, traffic, grad_y, grad_silu,
                  y, rms, grad_x, plan.grid, plan.range, strips, channels, eps);
  }

  const int lanes = lanes_for(channels / N);
  const int64_t packs_per_lane = ceil_div(channels / N, lanes);
  if (!aligned || channels % N != 0) {
    return launch(resample_down_pixel_norm_backward_long_rows<T, 1>, ceil_div(plan.cells * kWarpSize, kThreads),
                  kThreads, stream, traffic, grad_y, grad_silu, y, rms, grad_x, plan.grid, plan.range, plan.cells, eps);
  }
  if (packs_per_lane > kMostPacksPerLane) {
    return launch(resample_down_pixel_norm_backward_long_rows<T, N>, ceil_div(plan.cells * kWarpSize, kThreads),
                  kThreads, stream, traffic, grad_y, grad_silu, y, rms, grad_x, plan.grid, plan.range, plan.cells, eps);
  }
  return dispatch_packs(packs_per_lane, [&](auto packs) {
    return launch(resample_down_pixel_norm_backward_rows<T, packs>, ceil_div(plan.cells * lanes, kThreads), kThreads,
                  stream, traffic, grad_y, grad_silu, y, rms, grad_x, plan.grid, plan.range, plan.cells, lanes, eps);
  });
}

}  // namespace

int launch_resample_down_pixel_norm(const ResampleDownPixelNormParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return forward<typename decltype(storage)::type>(params, stream); });
}

int launch_resample_down_pixel_norm_backward(const ResampleDownPixelNormBackwardParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return backward<typename decltype(storage)::type>(params, stream); });
}

}  // namespace edm2::cuda
