#include "edm2/resample.h"

#include <utility>

#include "launch.h"
#include "resample.cuh"

namespace edm2::cuda {
namespace {

static_assert(Taps::kMost == kMostTaps);

int64_t outer_of(const ResampleParams& params) {
  return params.channels_last ? params.batch : params.batch * params.channels;
}

int64_t inner_of(const ResampleParams& params) { return params.channels_last ? params.channels : 1; }

/// A filter with equal taps is (1, 1) times a weight.
bool is_box(const ResampleParams& params) { return params.taps == 2 && params.filter[0] == params.filter[1]; }

template <typename T, bool kUp, int N, bool kPairs>
cudaError_t launch_cells(const ResampleParams& params, const CellGrid& grid, Traffic traffic, cudaStream_t stream) {
  CellItems items{};
  items.rows = kUp ? ceil_div(grid.fine_height, 2) : grid.coarse_height;
  items.columns = (kUp ? ceil_div(grid.fine_width, 2) : grid.coarse_width) / (kPairs ? N : 1);
  items.packs = kPairs ? 1 : grid.inner / N;
  items.count = grid.outer * items.rows * items.columns * items.packs;
  const auto kernel = kUp ? resample_up_cells<T, N, kPairs> : resample_down_cells<T, N, kPairs>;
  const auto weight = static_cast<float>(params.filter[0] * params.filter[0]);
  return launch(kernel, ceil_div(items.count, kThreads), kThreads, stream, traffic, static_cast<const T*>(params.x),
                static_cast<T*>(params.y), grid, items, weight);
}

template <typename T, bool kUp>
cudaError_t box(const ResampleParams& params, cudaStream_t stream) {
  constexpr int N = kPack<T>;
  CellGrid grid{outer_of(params), inner_of(params), params.height, params.width, params.out_height, params.out_width};
  if (kUp) {
    std::swap(grid.fine_height, grid.coarse_height);
    std::swap(grid.fine_width, grid.coarse_width);
  }
  const int64_t planes = grid.outer * grid.inner * int64_t{sizeof(T)};
  const int64_t coarse_bytes = planes * grid.coarse_height * grid.coarse_width;
  const int64_t fine_bytes = planes * grid.fine_height * grid.fine_width;
  const Traffic traffic = kUp ? Traffic{coarse_bytes, fine_bytes} : Traffic{4 * coarse_bytes, coarse_bytes};
  const bool aligned = all_aligned(static_cast<const T*>(params.x), static_cast<const T*>(params.y));
  if (aligned && params.channels_last && grid.inner % N == 0) {
    return launch_cells<T, kUp, N, false>(params, grid, traffic, stream);
  }
  if (aligned && grid.inner == 1 && grid.coarse_width % N == 0 && grid.fine_width == 2 * grid.coarse_width) {
    return launch_cells<T, kUp, N, true>(params, grid, traffic, stream);
  }
  return launch_cells<T, kUp, 1, false>(params, grid, traffic, stream);
}

template <typename T, bool kUp>
cudaError_t gather(const ResampleParams& params, cudaStream_t stream) {
  constexpr int N = kPack<T>;
  if (params.taps > kMostTaps) return cudaErrorInvalidValue;
  const auto* x = static_cast<const T*>(params.x);
  auto* y = static_cast<T*>(params.y);
  const ImageSizes sizes{outer_of(params), inner_of(params),  params.height,
                         params.width,     params.out_height, params.out_width};
  Taps taps{};
  taps.count = static_cast<int>(params.taps);
  for (int k = 0; k < taps.count; ++k) taps.tap[k] = static_cast<float>(params.filter[k]);
  const int64_t planes = params.batch * params.channels;
  const int64_t outputs = planes * params.out_height * params.out_width;
  const Traffic traffic{planes * params.height * params.width * int64_t{sizeof(T)}, outputs * int64_t{sizeof(T)}};
  if (sizes.inner % N == 0 && all_aligned(x, y)) {
    return launch(resample_gather<T, N, kUp>, ceil_div(outputs / N, kThreads), kThreads, stream, traffic, x, y, sizes,
                  outputs / N, taps);
  }
  return launch(resample_gather<T, 1, kUp>, ceil_div(outputs, kThreads), kThreads, stream, traffic, x, y, sizes,
                outputs, taps);
}

template <bool kUp>
int resample(const ResampleParams& params, cudaStream_t stream) {
  return dispatch_storage(params.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    return is_box(params) ? box<T, kUp>(params, stream) : gather<T, kUp>(params, stream);
  });
}

}  // namespace

int launch_resample_down(const ResampleParams& params, CUstream_st* stream) { return resample<false>(params, stream); }

int launch_resample_up(const ResampleParams& params, CUstream_st* stream) { return resample<true>(params, stream); }

}  // namespace edm2::cuda
