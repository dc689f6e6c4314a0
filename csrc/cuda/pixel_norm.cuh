// Pixel norm, y = x / s with s = eps + rms(x) over channels, and its backward; optionally with MP-SiLU of the result.
//
// channels_last: a group of lanes owns one pixel and keeps its channels in registers, so that memory is read once
// (pixel_norm_rows); pixels of too many channels, or not made of 16-byte packs, are read once per step
// (pixel_norm_long_rows). contiguous: a block owns a strip of neighbouring pixels, its threads share out the channels
// (pixel_norm_planes).
#pragma once

#include "device.cuh"

namespace edm2::cuda {

__device__ inline float inverse_pixel_scale(float squares, float channels, float eps) {
  return math::divide(1.0f, eps + sqrtf(squares / channels));
}

/// The factor of x in the gradient g / s - x * factor (spec 2.1).
__device__ inline float pixel_norm_projection(float squares, float dot_gx, float channels, float eps) {
  const float inverse_scale = inverse_pixel_scale(squares, channels, eps);
  return math::normalize_grad_coef(dot_gx, inverse_scale, sqrtf(squares / channels), channels);
}

/// y, and MP-SiLU of it unless `y_silu` is null.
template <int N, typename T>
__device__ void store_with_silu(T* y, T* y_silu, int64_t at, const Floats<N>& values) {
  store(y + at, values);
  if (y_silu != nullptr) store(y_silu + at, mp_silu(values));
}

/// Gradient that reaches y: directly, and through MP-SiLU where that was emitted.
template <bool kSiLU, int N>
__device__ Floats<N> gradient_of_y(const Floats<N>& grad_y, const Floats<N>& grad_silu, const Floats<N>& y) {
  if constexpr (kSiLU) return grad_y + grad_silu * mp_silu_grad(y);
  return grad_y;
}

/// channels_last; a pixel's channels are up to kPacks packs in each of `lanes` lanes.
template <typename T, int kPacks>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kPacks>)
    pixel_norm_rows(const T* __restrict__ x, T* __restrict__ y, T* __restrict__ y_silu, int64_t pixels, int channels,
                    int lanes, float eps) {
  constexpr int N = kPack<T>;
  const float n = static_cast<float>(channels);
  const LaneGroups groups(lanes);
  for (int64_t first = groups.first; first < pixels; first += groups.step) {
    const int64_t pixel = first + groups.within_warp;
    const int64_t row = pixel * channels;
    const int end = pixel < pixels ? channels : 0;
    Packed<T, N> held[kPacks];
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = (groups.lane + k * lanes) * N;
      if (c < end) held[k] = Packed<T, N>::load(x + row + c);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = (groups.lane + k * lanes) * N;
      if (c < end) squares += sum(unpack(held[k]) * unpack(held[k]));
    }
    const float inverse_scale = inverse_pixel_scale(sum_over_lanes(squares, lanes), n, eps);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = (groups.lane + k * lanes) * N;
      if (c < end) store_with_silu(y, y_silu, row + c, unpack(held[k]) * inverse_scale);
    }
  }
}

template <typename T, int kPacks, bool kSiLU>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<3 * kPacks>)
    pixel_norm_backward_rows(const T* __restrict__ grad_y, const T* __restrict__ grad_silu, const T* __restrict__ x,
                             T* __restrict__ grad_x, int64_t pixels, int channels, int lanes, float eps) {
  constexpr int N = kPack<T>;
  const float n = static_cast<float>(channels);
  const LaneGroups groups(lanes);
  for (int64_t first = groups.first; first < pixels; first += groups.step) {
    const int64_t pixel = first + groups.within_warp;
    const int64_t row = pixel * channels;
    const int end = pixel < pixels ? channels : 0;
    Packed<T, N> held_x[kPacks];
    Packed<T, N> held_grad[kPacks];
    Packed<T, N> held_silu[kPacks];
    float squares = 0.0f;
    float dot_gx = 0.0f;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = (groups.lane + k * lanes) * N;
      if (c >= end) continue;
      held_x[k] = Packed<T, N>::load(x + row + c);
      held_grad[k] = Packed<T, N>::load(grad_y + row + c);
      held_silu[k] = kSiLU ? Packed<T, N>::load(grad_silu + row + c) : held_grad[k];
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = (groups.lane + k * lanes) * N;
      if (c < end) squares += sum(unpack(held_x[k]) * unpack(held_x[k]));
    }
    squares = sum_over_lanes(squares, lanes);
    const float inverse_scale = inverse_pixel_scale(squares, n, eps);
    const auto gradient = [&](int k) {
      return gradient_of_y<kSiLU>(unpack(held_grad[k]), unpack(held_silu[k]), unpack(held_x[k]) * inverse_scale);
    };
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = (groups.lane + k * lanes) * N;
      if (c < end) dot_gx += sum(gradient(k) * unpack(held_x[k]));
    }
    const float projection = pixel_norm_projection(squares, sum_over_lanes(dot_gx, lanes), n, eps);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int c = (groups.lane + k * lanes) * N;
      if (c < end) store(grad_x + row + c, gradient(k) * inverse_scale - unpack(held_x[k]) * projection);
    }
  }
}

/// channels_last, any number of channels at any alignment: a warp per pixel.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    pixel_norm_long_rows(const T* __restrict__ x, T* __restrict__ y, T* __restrict__ y_silu, int64_t pixels,
                         int64_t channels, float eps) {
  const float n = static_cast<float>(channels);
  const LaneGroups groups(kWarpSize);
  for (int64_t pixel = groups.first; pixel < pixels; pixel += groups.step) {
    const int64_t row = pixel * channels;
    const int64_t head = elements_to_boundary(channels, x + row, y + row, y_silu == nullptr ? y + row : y_silu + row);
    float squares = 0.0f;
    for_each_pack<T>(channels, head, groups.lane, kWarpSize, [&](auto width, int64_t c) {
      const auto here = load<width>(x + row + c);
      squares += sum(here * here);
    });
    const float inverse_scale = inverse_pixel_scale(sum_over_lanes(squares, kWarpSize), n, eps);
    for_each_pack<T>(channels, head, groups.lane, kWarpSize, [&](auto width, int64_t c) {
      store_with_silu(y, y_silu, row + c, load<width>(x + row + c) * inverse_scale);
    });
  }
}

template <typename T, bool kSiLU>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    pixel_norm_backward_long_rows(const T* __restrict__ grad_y, const T* __restrict__ grad_silu,
                                  const T* __restrict__ x, T* __restrict__ grad_x, int64_t pixels, int64_t channels,
                                  float eps) {
  const float n = static_cast<float>(channels);
  const LaneGroups groups(kWarpSize);
  if constexpr (!kSiLU) grad_silu = grad_y;
  for (int64_t pixel = groups.first; pixel < pixels; pixel += groups.step) {
    const int64_t row = pixel * channels;
    const int64_t head = elements_to_boundary(channels, x + row, grad_y + row, grad_silu + row, grad_x + row);
    float squares = 0.0f;
    for_each_pack<T>(channels, head, groups.lane, kWarpSize, [&](auto width, int64_t c) {
      const auto here = load<width>(x + row + c);
      squares += sum(here * here);
    });
    squares = sum_over_lanes(squares, kWarpSize);
    const float inverse_scale = inverse_pixel_scale(squares, n, eps);
    const auto gradient = [&](auto width, int64_t at) {
      return gradient_of_y<kSiLU>(load<width>(grad_y + at), load<width>(grad_silu + at),
                                  load<width>(x + at) * inverse_scale);
    };
    float dot_gx = 0.0f;
    for_each_pack<T>(channels, head, groups.lane, kWarpSize, [&](auto width, int64_t c) {
      dot_gx += sum(gradient(width, row + c) * load<width>(x + row + c));
    });
    const float projection = pixel_norm_projection(squares, sum_over_lanes(dot_gx, kWarpSize), n, eps);
    for_each_pack<T>(channels, head, groups.lane, kWarpSize, [&](auto width, int64_t c) {
      store(grad_x + row + c, gradient(width, row + c) * inverse_scale - load<width>(x + row + c) * projection);
    });
  }
}

/// A strip of neighbouring pixels of one sample: four lanes of packs, or a warp's lanes of single elements, run along
/// the pixels, and the block's threads share out the channels in slices.
template <int N>
struct PixelStrip {
  static constexpr int kLanes = N == 1 ? kWarpSize : 4;
  static constexpr int kPixels = kLanes * N;
  static constexpr int kSlices = kThreads / kLanes;

  int64_t base;   // offset of (sample, channel 0, own first pixel)
  int64_t first;  // own channels: first, first + kSlices, ... below end
  int64_t end;

  __device__ PixelStrip(int64_t strip, int64_t channels, int64_t pixels) {
    const int64_t strips = (pixels + kPixels - 1) / kPixels;
    const int64_t pixel = strip % strips * kPixels + threadIdx.x % kLanes * N;
    base = strip / strips * channels * pixels + pixel;
    first = threadIdx.x / kLanes;
    end = pixel < pixels ? channels : 0;
  }
};

/// Per pixel of the strip, the sum over all slices of channels; every thread gets those of its own pixels.
template <int N>
__device__ Floats<N> sum_over_slices(Floats<N> sums) {
  constexpr int kLanes = PixelStrip<N>::kLanes;
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ Floats<N> partial[kWarps][kLanes];
  const int lane = threadIdx.x % kWarpSize;
  for (int offset = kLanes; offset < kWarpSize; offset *= 2) {
    sums = map([offset](float v) { return v + __shfl_xor_sync(kWholeWarp, v, offset); }, sums);
  }
  if (lane < kLanes) partial[threadIdx.x / kWarpSize][lane] = sums;
  __syncthreads();
  sums = partial[0][lane % kLanes];
  for (int warp = 1; warp < kWarps; ++warp) sums = sums + partial[warp][lane % kLanes];
  __syncthreads();  // the next call overwrites `partial`
  return sums;
}

/// contiguous (NCHW).
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    pixel_norm_planes(const T* __restrict__ x, T* __restrict__ y, T* __restrict__ y_silu, int64_t strips,
                      int64_t channels, int64_t pixels, float eps) {
  using Strip = PixelStrip<N>;
  const float n = static_cast<float>(channels);
  for (int64_t s = blockIdx.x; s < strips; s += gridDim.x) {
    const Strip strip(s, channels, pixels);
    Floats<N> squares = {};
#pragma unroll 2
    for (int64_t c = strip.first; c < strip.end; c += Strip::kSlices) {
      const auto here = load<N>(x + strip.base + c * pixels);
      squares = squares + here * here;
    }
    squares = sum_over_slices(squares);
    const auto inverse_scale = map([=](float v) { return inverse_pixel_scale(v, n, eps); }, squares);
#pragma unroll 2
    for (int64_t c = strip.first; c < strip.end; c += Strip::kSlices) {
      const int64_t at = strip.base + c * pixels;
      store_with_silu(y, y_silu, at, load<N>(x + at) * inverse_scale);
    }
  }
}

template <typename T, int N, bool kSiLU>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    pixel_norm_backward_planes(const T* __restrict__ grad_y, const T* __restrict__ grad_silu, const T* __restrict__ x,
                               T* __restrict__ grad_x, int64_t strips, int64_t channels, int64_t pixels, float eps) {
  using Strip = PixelStrip<N>;
  const float n = static_cast<float>(channels);
  if constexpr (!kSiLU) grad_silu = grad_y;
  for (int64_t s = blockIdx.x; s < strips; s += gridDim.x) {
    const Strip strip(s, channels, pixels);
    Floats<N> squares = {};
#pragma unroll 2
    for (int64_t c = strip.first; c < strip.end; c += Strip::kSlices) {
      const auto here = load<N>(x + strip.base + c * pixels);
      squares = squares + here * here;
    }
    squares = sum_over_slices(squares);
    const auto inverse_scale = map([=](float v) { return inverse_pixel_scale(v, n, eps); }, squares);
    const auto gradient = [&](int64_t at) {
      return gradient_of_y<kSiLU>(load<N>(grad_y + at), load<N>(grad_silu + at), load<N>(x + at) * inverse_scale);
    };
    Floats<N> dot_gx = {};
#pragma unroll 2
    for (int64_t c = strip.first; c < strip.end; c += Strip::kSlices) {
      const int64_t at = strip.base + c * pixels;
      dot_gx = dot_gx + gradient(at) * load<N>(x + at);
    }
    dot_gx = sum_over_slices(dot_gx);
    const auto projection = map([=](float v, float d) { return pixel_norm_projection(v, d, n, eps); }, squares, dot_gx);
#pragma unroll 2
    for (int64_t c = strip.first; c < strip.end; c += Strip::kSlices) {
      const int64_t at = strip.base + c * pixels;
      store(grad_x + at, gradient(at) * inverse_scale - load<N>(x + at) * projection);
    }
  }
}

}  // namespace edm2::cuda
