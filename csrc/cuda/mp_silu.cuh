// MP-SiLU and modulated MP-SiLU, f(x c) with c per sample and channel, optionally followed by dropout, and their
// backwards.
//
// The modulated backward also sums the gradient of c over pixels: chunk by chunk of pixels, in a fixed order within a
// chunk, and a second kernel adds the chunks. So the result depends neither on scheduling nor on the GPU.
#pragma once

#include "device.cuh"
#include "edm2/philox.h"

namespace edm2::cuda {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mp_silu_elements(const T* __restrict__ x, T* __restrict__ y, int64_t numel) {
  const int64_t head = elements_to_boundary(numel, x, y);
  for_each_pack<T>(numel, head, blockIdx.x * int64_t{kThreads} + threadIdx.x, gridDim.x * int64_t{kThreads},
                   [&](auto width, int64_t at) { store(y + at, mp_silu(load<width>(x + at))); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mp_silu_backward_elements(const T* __restrict__ grad_y, const T* __restrict__ x, T* __restrict__ grad_x,
                              int64_t numel) {
  const int64_t head = elements_to_boundary(numel, grad_y, x, grad_x);
  for_each_pack<T>(numel, head, blockIdx.x * int64_t{kThreads} + threadIdx.x, gridDim.x * int64_t{kThreads},
                   [&](auto width, int64_t at) {
                     store(grad_x + at, load<width>(grad_y + at) * mp_silu_grad(load<width>(x + at)));
                   });
}

/// What dropout does to values of an activation, or, in its backward, to gradients: nothing unless kOn.
template <bool kOn>
struct DropoutMask {
  __device__ explicit DropoutMask(const Dropout&) {}

  template <int N>
  __device__ Floats<N> of_neighbours(const Floats<N>& values, int64_t) const {
    return values;
  }
  template <int N>
  __device__ Floats<N> of_strided(const Floats<N>& values, int64_t, int64_t) const {
    return values;
  }
};

template <>
struct DropoutMask<true> {
  int64_t subsequence;
  int64_t seed;
  int64_t offset;
  uint32_t threshold;
  float scale;

  __device__ explicit DropoutMask(const Dropout& dropout)
      : subsequence(dropout.subsequence),
        seed(dropout.philox[0]),
        offset(dropout.philox[1]),
        threshold(static_cast<uint32_t>(dropout.threshold)),
        scale(65536.0f / static_cast<float>(65536 - dropout.threshold)) {}

  /// Values of elements first, first + 1, ... of the mask's order, which one call of Philox covers.
  template <int N>
  __device__ Floats<N> of_neighbours(Floats<N> values, int64_t first) const {
    static_assert(math::kPhiloxElements % N == 0);
    const math::Philox bits = math::dropout_bits(first / math::kPhiloxElements, subsequence, seed, offset);
    const int start = static_cast<int>(first % math::kPhiloxElements);
#pragma unroll
    for (int group = 0; group < math::kPhiloxElements / N; ++group) {  // static indices keep the words in registers
      if (start != group * N) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int at = group * N + i;
        const uint32_t half = (bits.words[at / 2] >> (at % 2 * 16)) & 0xffffu;
        values.v[i] *= half < threshold ? 0.0f : scale;
      }
    }
    return values;
  }

  /// Values of elements first, first + stride, ...
  template <int N>
  __device__ Floats<N> of_strided(Floats<N> values, int64_t first, int64_t stride) const {
    unsigned kept = 0;
#pragma unroll 1
    for (int i = 0; i < N; ++i) {
      const Floats<1> factor = of_neighbours(Floats<1>{{1.0f}}, first + i * stride);
      kept |= static_cast<unsigned>(factor.v[0] != 0.0f) << i;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) values.v[i] *= (kept >> i & 1) != 0 ? scale : 0.0f;
    return values;
  }
};

/// Pixels in one chunk: few enough to keep the GPU busy, enough for the partial sums to stay below 1 % of the memory
/// traffic.
template <bool kChannelsLast>
inline constexpr int64_t kChunkPixels = kChannelsLast ? 144 : 4096;

template <bool kChannelsLast>
__host__ __device__ constexpr int64_t count_chunks(int64_t pixels) {
  return (pixels + kChunkPixels<kChannelsLast> - 1) / kChunkPixels<kChannelsLast>;
}

/// Where the sum over one chunk goes: to `partial` [chunks, batch * channels], or, if that is null (one chunk),
/// straight to grad_c.
template <typename T>
struct ChunkSums {
  float* partial;
  T* grad_c;
  int64_t count;  // batch * channels

  __device__ void store(int64_t chunk, int64_t at, float value) const {
    if (partial == nullptr) {
      grad_c[at] = from_float<T>(value);
    } else {
      partial[chunk * count + at] = value;
    }
  }
};

/// channels_last: the work of one block, a chunk of pixels of one sample and as many columns of N channels as the block
/// is wide (blockDim.x). The block's rows (blockDim.y) share out the pixels. Tiles are ordered (sample, columns,
/// chunk).
template <int N>
struct ModulatedTile {
  int64_t chunk;
  int64_t sample;
  int64_t first_channel;  // of the tile
  int64_t channel;        // of this thread
  int64_t first_pixel;    // of this thread
  int64_t end_pixel;

  __device__ ModulatedTile(int64_t tile, int64_t channels, int64_t pixels) {
    const int64_t chunks = count_chunks<true>(pixels);
    const int64_t width = int64_t{blockDim.x} * N;
    const int64_t tiles_across = (channels + width - 1) / width;
    chunk = tile % chunks;
    sample = tile / chunks / tiles_across;
    first_channel = tile / chunks % tiles_across * width;
    channel = first_channel + int64_t{threadIdx.x} * N;
    first_pixel = chunk * kChunkPixels<true> + threadIdx.y;
    end_pixel = (chunk + 1) * kChunkPixels<true>;
    if (end_pixel > pixels) end_pixel = pixels;
    if (channel >= channels) end_pixel = first_pixel;
  }
};

template <typename T, int N, bool kDropout>
__global__ void __launch_bounds__(kThreads)
    mp_silu_modulated_columns(const T* __restrict__ x, const T* __restrict__ c, T* __restrict__ y, Dropout dropout,
                              int64_t tiles, int64_t channels, int64_t pixels) {
  const DropoutMask<kDropout> mask(dropout);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const ModulatedTile<N> tile(t, channels, pixels);
    if (tile.first_pixel >= tile.end_pixel) continue;
    const auto scale = load<N>(c + tile.sample * channels + tile.channel);
    for (int64_t pixel = tile.first_pixel; pixel < tile.end_pixel; pixel += blockDim.y) {
      const int64_t at = (tile.sample * pixels + pixel) * channels + tile.channel;
      store(y + at, mask.of_neighbours(mp_silu(load<N>(x + at) * scale), at));
    }
  }
}

template <typename T, int N, bool kDropout>
__global__ void __launch_bounds__(kThreads)
    mp_silu_modulated_backward_columns(const T* __restrict__ grad_y, const T* __restrict__ x, const T* __restrict__ c,
                                       T* __restrict__ grad_x, ChunkSums<T> chunk_sums, Dropout dropout, int64_t tiles,
                                       int64_t channels, int64_t pixels) {
  const DropoutMask<kDropout> mask(dropout);
  __shared__ float sums[kThreads * N];  // [blockDim.y, blockDim.x * N]
  const int width = static_cast<int>(blockDim.x) * N;
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const ModulatedTile<N> tile(t, channels, pixels);
    Floats<N> grad_scale = {};
    if (tile.first_pixel < tile.end_pixel) {
      const auto scale = load<N>(c + tile.sample * channels + tile.channel);
      for (int64_t pixel = tile.first_pixel; pixel < tile.end_pixel; pixel += blockDim.y) {
        const int64_t at = (tile.sample * pixels + pixel) * channels + tile.channel;
        const auto here = load<N>(x + at);
        const auto grad_z = mask.of_neighbours(load<N>(grad_y + at), at) * mp_silu_grad(here * scale);
        store(grad_x + at, grad_z * scale);
        grad_scale = grad_scale + grad_z * here;
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sums[thread * N + j] = grad_scale.v[j];
    __syncthreads();
    for (int column = thread; column < width; column += static_cast<int>(blockDim.x * blockDim.y)) {
      if (tile.first_channel + column >= channels) break;
      float total = 0.0f;
      for (int row = 0; row < static_cast<int>(blockDim.y); ++row) total += sums[row * width + column];
      chunk_sums.store(tile.chunk, tile.sample * channels + tile.first_channel + column, total);
    }
    __syncthreads();  // the next tile overwrites `sums`
  }
}

/// contiguous: the part of a plane (sample, channel) that one group of lanes handles. Chunks are ordered (plane,
/// chunk).
struct PlaneChunk {
  int64_t plane;
  int64_t chunk;
  int64_t begin;
  int64_t count;
  int64_t first_masked;  // its first element in the order of dropout's mask; the next ones follow `channels` apart

  __device__ PlaneChunk(int64_t index, int64_t channels, int64_t pixels) {
    const int64_t chunks = count_chunks<false>(pixels);
    plane = index / chunks;
    chunk = index % chunks;
    begin = plane * pixels + chunk * kChunkPixels<false>;
    count = pixels - chunk * kChunkPixels<false>;
    if (count > kChunkPixels<false>) count = kChunkPixels<false>;
    first_masked = (plane / channels * pixels + chunk * kChunkPixels<false>)*channels + plane % channels;
  }
};

template <typename T, bool kDropout>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    mp_silu_modulated_planes(const T* __restrict__ x, const T* __restrict__ c, T* __restrict__ y, Dropout dropout,
                             int64_t chunks, int64_t channels, int64_t pixels, int lanes) {
  const DropoutMask<kDropout> mask(dropout);
  const LaneGroups groups(lanes);
  for (int64_t index = groups.first + groups.within_warp; index < chunks; index += groups.step) {
    const PlaneChunk own(index, channels, pixels);
    const float scale = to_float(c[own.plane]);
    const int64_t head = elements_to_boundary(own.count, x + own.begin, y + own.begin);
    for_each_pack<T>(own.count, head, groups.lane, lanes, [&](auto width, int64_t i) {
      const auto value = mp_silu(load<width>(x + own.begin + i) * scale);
      store(y + own.begin + i, mask.of_strided(value, own.first_masked + i * channels, channels));
    });
  }
}

template <typename T, bool kDropout>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    mp_silu_modulated_backward_planes(const T* __restrict__ grad_y, const T* __restrict__ x, const T* __restrict__ c,
                                      T* __restrict__ grad_x, ChunkSums<T> chunk_sums, Dropout dropout, int64_t chunks,
                                      int64_t channels, int64_t pixels, int lanes) {
  const DropoutMask<kDropout> mask(dropout);
  const LaneGroups groups(lanes);
  for (int64_t first = groups.first; first < chunks; first += groups.step) {
    const int64_t index = first + groups.within_warp;
    const PlaneChunk own(index, channels, pixels);
    float grad_scale = 0.0f;
    if (index < chunks) {
      const float scale = to_float(c[own.plane]);
      const int64_t head = elements_to_boundary(own.count, grad_y + own.begin, x + own.begin, grad_x + own.begin);
      for_each_pack<T>(own.count, head, groups.lane, lanes, [&](auto width, int64_t i) {
        const auto here = load<width>(x + own.begin + i);
        const auto grad_here = load<width>(grad_y + own.begin + i);
        const auto grad_z =
            mask.of_strided(grad_here, own.first_masked + i * channels, channels) * mp_silu_grad(here * scale);
        store(grad_x + own.begin + i, grad_z * scale);
        grad_scale += sum(grad_z * here);
      });
    }
    grad_scale = sum_over_lanes(grad_scale, lanes);
    if (index < chunks && groups.lane == 0) chunk_sums.store(own.chunk, own.plane, grad_scale);
  }
}

/// grad_c = sum over chunks of `partial` [chunks, count].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mp_silu_modulated_add_chunks(const float* __restrict__ partial, T* __restrict__ grad_c, int64_t chunks,
                                 int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += gridDim.x * int64_t{kThreads}) {
    float total = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * count + i];
    grad_c[i] = from_float<T>(total);
  }
}

}  // namespace edm2::cuda
