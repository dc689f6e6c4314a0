// Images [channels, pixels] of two layouts side by side: what kernels that change the layout on the way share. A thread
// owns neighbours in the memory of one tensor, and gathers what belongs to them from another.
#pragma once

#include "device.cuh"
#include "edm2/noise_level.h"

namespace edm2::cuda {

/// One sample in its layout.
struct Image {
  int64_t channels;
  int64_t pixels;
  bool channels_last;

  __host__ __device__ int64_t numel() const { return channels * pixels; }
  __device__ int64_t at(int64_t channel, int64_t pixel) const {
    return channels_last ? pixel * channels + channel : channel * pixels + pixel;
  }
};

/// Calls body(i, channel, pixel) for the N elements of a sample from `first` on, in the order of its memory.
template <int N, typename Body>
__device__ void for_each_neighbour(const Image& image, int64_t first, Body body) {
  const int64_t inner = image.channels_last ? image.channels : image.pixels;
  int64_t outer = first / inner;
  int64_t within = first - outer * inner;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    body(i, image.channels_last ? within : outer, image.channels_last ? outer : within);
    if (++within == inner) {
      within = 0;
      ++outer;
    }
  }
}

/// Their values value(channel, pixel).
template <int N, typename Value>
__device__ Floats<N> for_neighbours(const Image& image, int64_t first, Value value) {
  Floats<N> out;
  for_each_neighbour<N>(image, first, [&](int i, int64_t channel, int64_t pixel) { out.v[i] = value(channel, pixel); });
  return out;
}

/// A unit of N neighbours in one sample of an image.
struct Unit {
  int64_t sample;
  int64_t first;  // element of the sample
};

/// Calls body(Unit) for the thread's share of the units of all samples.
template <int N, typename Body>
__device__ void for_each_unit(int64_t batch, int64_t numel, Body body) {
  const int64_t units = numel / N;
#pragma unroll 1
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < batch * units;
       i += gridDim.x * int64_t{kThreads}) {
    const int64_t sample = i / units;
    body(Unit{sample, (i - sample * units) * N});
  }
}

}  // namespace edm2::cuda
