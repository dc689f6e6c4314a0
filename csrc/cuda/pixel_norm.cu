#include "edm2/pixel_norm.h"

#include "launch.h"
#include "pixel_norm.cuh"

namespace edm2::cuda {
namespace {

template <int N>
int64_t count_strips(const Activation& shape) {
  return shape.batch * ceil_div(shape.pixels, PixelStrip<N>::kPixels);
}

template <typename T>
cudaError_t forward(const PixelNormParams& params, cudaStream_t stream) {
  constexpr int N = kPack<T>;
  const auto* x = static_cast<const T*>(params.x);
  auto* y = static_cast<T*>(params.y);
  auto* y_silu = static_cast<T*>(params.y_silu);
  const auto [batch, channels, pixels, channels_last] = params.shape;
  const auto eps = static_cast<float>(params.eps);
  if (batch * channels * pixels == 0) return cudaSuccess;
  const bool aligned = all_aligned(x, y, y_silu);
  const int64_t bytes = batch * channels * pixels * int64_t{sizeof(T)};
  const Traffic traffic{bytes, y_silu == nullptr ? bytes : 2 * bytes};

  if (!channels_last) {
    if (aligned && pixels % N == 0) {
      const int64_t strips = count_strips<N>(params.shape);
      return launch(pixel_norm_planes<T, N>, strips, kThreads, stream, traffic, x, y, y_silu, strips, channels, pixels,
                    eps);
    }
    const int64_t strips = count_strips<1>(params.shape);
    return launch(pixel_norm_planes<T, 1>, strips, kThreads, stream, traffic, x, y, y_silu, strips, channels, pixels,
                  eps);
  }

  const int64_t rows = batch * pixels;
  const int lanes = lanes_for(channels / N);
  const int64_t packs_per_lane = ceil_div(channels / N, lanes);
  if (!aligned || channels % N != 0 || packs_per_lane > kMostPacksPerLane) {
    return launch(pixel_norm_long_rows<T>, ceil_div(rows * kWarpSize, kThreads), kThreads, stream, traffic, x, y,
                  y_silu, rows, channels, eps);
  }
  return dispatch_packs(packs_per_lane, [&](auto packs) {
    return launch(pixel_norm_rows<T, packs>, ceil_div(rows * lanes, kThreads), kThreads, stream, traffic, x, y, y_silu,
                  rows, static_cast<int>(channels), lanes, eps);
  });
}

template <typename T, bool kSiLU>
cudaError_t backward(const PixelNormBackwardParams& params, cudaStream_t stream) {
  constexpr int N = kPack<T>;
  const auto* grad_y = static_cast<const T*>(params.grad_y);
  const auto* grad_silu = static_cast<const T*>(params.grad_silu);
  const auto* x = static_cast<const T*>(params.x);
  auto* grad_x = static_cast<T*>(params.grad_x);
  const auto [batch, channels, pixels, channels_last] = params.shape;
  const auto eps = static_cast<float>(params.eps);
  if (batch * channels * pixels == 0) return cudaSuccess;
  const bool aligned = all_aligned(grad_y, grad_silu, x, grad_x);
  const int64_t bytes = batch * channels * pixels * int64_t{sizeof(T)};
  const Traffic traffic{kSiLU ? 3 * bytes : 2 * bytes, bytes};

  if (!channels_last) {
    if (aligned && pixels % N == 0) {
      const int64_t strips = count_strips<N>(params.shape);
      return launch(pixel_norm_backward_planes<T, N, kSiLU>, strips, kThreads, stream, traffic, grad_y, grad_silu, x,
                    grad_x, strips, channels, pixels, eps);
    }
    const int64_t strips = count_strips<1>(params.shape);
    return launch(pixel_norm_backward_planes<T, 1, kSiLU>, strips, kThreads, stream, traffic, grad_y, grad_silu, x,
                  grad_x, strips, channels, pixels, eps);
  }

  const int64_t rows = batch * pixels;
  const int lanes = lanes_for(channels / N);
  const int64_t packs_per_lane = ceil_div(channels / N, lanes);
  if (!aligned || channels % N != 0 || packs_per_lane > kMostPacksPerLane) {
    return launch(pixel_norm_backward_long_rows<T, kSiLU>, ceil_div(rows * kWarpSize, kThreads), kThreads, stream,
                  traffic, grad_y, grad_silu, x, grad_x, rows, channels, eps);
  }
  return dispatch_packs(packs_per_lane, [&](auto packs) {
    return launch(pixel_norm_backward_rows<T, packs, kSiLU>, ceil_div(rows * lanes, kThreads), kThreads, stream,
                  traffic, grad_y, grad_silu, x, grad_x, rows, static_cast<int>(channels), lanes, eps);
  });
}

}  // namespace

int launch_pixel_norm(const PixelNormParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return forward<typename decltype(storage)::type>(params, stream); });
}

int launch_pixel_norm_backward(const PixelNormBackwardParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    return params.grad_silu == nullptr ? backward<T, false>(params, stream) : backward<T, true>(params, stream);
  });
}

}  // namespace edm2::cuda
