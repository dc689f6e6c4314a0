// MP-Fourier (Eq. 75), y[n, i] = sqrt(2) * cos(x[n] * freqs[i] + phases[i]), and its backward, whose sums run in a
// fixed order.
#pragma once

#include "device.cuh"

namespace edm2::cuda {

/// sqrt(2) * cos(x * freq + phase), or sin if Sine. Everything up to the reduction to |r| <= pi / 4 is in fp64, where
/// two parts of pi / 2 do for any angle of use (the library's sinf and cosf put large ones through local memory).
/// Beyond 2^48, where fp32 has long lost the angle, another angle is taken; infinity and NaN give NaN.
template <bool Sine>
__device__ inline float wave(float x, float freq, float phase) {
  constexpr double kLimit = 0x1p48;
  constexpr double kRounds = 0x1.8p52;  // added and subtracted, rounds to an integer
  const double given = static_cast<double>(x) * static_cast<double>(freq) + static_cast<double>(phase);
  const double angle = math::clamp(given, kLimit);
  const double k = (angle * 0.63661977236758134 + kRounds) - kRounds;
  const double r = ::fma(-k, 6.12323399573676604e-17, ::fma(-k, 1.57079632679489656, angle));
  const double shifted = Sine ? k : k + 1.0;  // cos(x) = sin(x + pi / 2)
  const double quadrant = shifted - 4.0 * ::floor(shifted * 0.25);
  const auto reduced = static_cast<float>(r);
  const float value = quadrant == 1.0 || quadrant == 3.0 ? math::reduced_cosine(reduced) : math::reduced_sine(reduced);
  return (quadrant >= 2.0 ? -1.41421356f : 1.41421356f) * value + static_cast<float>(given - given);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mp_fourier_elements(const T* __restrict__ x, const float* __restrict__ freqs, const float* __restrict__ phases,
                        T* __restrict__ y, int64_t batch, int64_t channels) {
  const int64_t numel = batch * channels;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < numel; i += gridDim.x * int64_t{kThreads}) {
    const int64_t channel = i % channels;
    y[i] = from_float<T>(wave<false>(to_float(x[i / channels]), freqs[channel], phases[channel]));
  }
}

/// grad_x[n] = -sum over i of grad_y[n, i] * sqrt(2) sin(angle) * freqs[i]: a warp for each n.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mp_fourier_backward_x(const T* __restrict__ grad_y, const T* __restrict__ x, const float* __restrict__ freqs,
                          const float* __restrict__ phases, T* __restrict__ grad_x, int64_t batch, int64_t channels) {
  const LaneGroups groups(kWarpSize);
  for (int64_t n = groups.first; n < batch; n += groups.step) {
    const float own = to_float(x[n]);
    double total = 0.0;
    for (int64_t i = groups.lane; i < channels; i += kWarpSize) {
      total -= to_float(grad_y[n * channels + i]) * wave<true>(own, freqs[i], phases[i]) * freqs[i];
    }
    const float sum = sum_over_lanes(static_cast<float>(total), kWarpSize);
    if (groups.lane == 0) grad_x[n] = from_float<T>(sum);
  }
}

/// Rows of a block that is a warp wide.
inline constexpr int kFourierRows = kThreads / kWarpSize;

/// grad_phases[i] = -sum over n of grad_y[n, i] * sqrt(2) sin(angle), and the same times x[n] for grad_freqs: a block
/// for kWarpSize channels, whose rows share out the samples.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mp_fourier_backward_buffers(const T* __restrict__ grad_y, const T* __restrict__ x, const float* __restrict__ freqs,
                                const float* __restrict__ phases, float* __restrict__ grad_freqs,
                                float* __restrict__ grad_phases, int64_t batch, int64_t channels) {
  __shared__ double sums[2][kFourierRows][kWarpSize];
  for (int64_t first = blockIdx.x * int64_t{kWarpSize}; first < channels; first += gridDim.x * int64_t{kWarpSize}) {
    const int64_t channel = first + threadIdx.x;
    double grad_phase = 0.0;
    double grad_freq = 0.0;
    if (channel < channels) {
      for (int64_t n = threadIdx.y; n < batch; n += kFourierRows) {
        const float sample = to_float(x[n]);
        const float wave_grad =
            -to_float(grad_y[n * channels + channel]) * wave<true>(sample, freqs[channel], phases[channel]);
        grad_phase += wave_grad;
        grad_freq += static_cast<double>(wave_grad) * sample;
      }
    }
    sums[0][threadIdx.y][threadIdx.x] = grad_phase;
    sums[1][threadIdx.y][threadIdx.x] = grad_freq;
    __syncthreads();
    if (threadIdx.y == 0 && channel < channels) {
      for (int row = 1; row < kFourierRows; ++row) {
        grad_phase += sums[0][row][threadIdx.x];
        grad_freq += sums[1][row][threadIdx.x];
      }
      grad_phases[channel] = static_cast<float>(grad_phase);
      grad_freqs[channel] = static_cast<float>(grad_freq);
    }
    __syncthreads();  // the next channels overwrite `sums`
  }
}

}  // namespace edm2::cuda
