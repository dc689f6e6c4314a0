// The training loss of the U-Net's output F and its gradients (spec 4.1). A warp takes a chunk of one sample: it writes
// the gradient of F in packs, or single elements where samples are not made of packs, gathering from the images, and
// the sum of squared errors. A second kernel adds the chunks of each sample in a fixed order.
#pragma once

#include "edm2/denoising_loss.h"
#include "image.cuh"
#include "rows.cuh"

namespace edm2::cuda {

/// Elements of a chunk: a multiple of every pack.
inline constexpr int64_t kLossChunk = 512;

/// squares [batch, chunks]: sums of (D - y)^2.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    denoising_loss_chunks(const T* __restrict__ f, const float* __restrict__ x, const float* __restrict__ y,
                          const float* __restrict__ sigmas, const float* __restrict__ us, T* __restrict__ grad_f,
                          float* __restrict__ squares, Image image, Image raw, int64_t batch, int64_t chunks,
                          double sigma_data, float scale) {
  const LaneGroups groups(kWarpSize);
  for (int64_t index = groups.first; index < batch * chunks; index += groups.step) {
    const int64_t sample = index / chunks;
    const int64_t first = (index - sample * chunks) * kLossChunk;
    const int64_t left = raw.numel() - first;
    const int64_t end = first + (left < kLossChunk ? left : kLossChunk);
    const int64_t start = sample * raw.numel();
    const float sigma = sigmas[sample];
    const float c_skip = math::c_skip(sigma, sigma_data);
    const float c_out = math::c_out(sigma, sigma_data);
    const float grad = 2.0f * scale * expf(-us[sample]) / c_out;  // 2 scale (lambda / exp(u)) c_out
    float total = 0.0f;
    for (int64_t i = first + groups.lane * N; i < end; i += kWarpSize * N) {
      const auto rest = for_neighbours<N>(raw, i, [&](int64_t channel, int64_t pixel) {
        const int64_t at = start + image.at(channel, pixel);
        return c_skip * x[at] - y[at];
      });
      const auto error = load<N>(f + start + i) * c_out + rest;
      store(grad_f + start + i, error * grad);
      total += sum(error * error);
    }
    total = sum_over_lanes(total, kWarpSize);
    if (groups.lane == 0) squares[index] = total;
  }
}

/// The loss of each sample and the gradient of u; a warp takes a sample.
__global__ void __launch_bounds__(kThreads)
    denoising_loss_samples(const float* __restrict__ squares, const float* __restrict__ sigmas,
                           const float* __restrict__ us, float* __restrict__ loss, float* __restrict__ grad_u,
                           int64_t batch, int64_t chunks, int64_t numel, double sigma_data, float scale) {
  const LaneGroups groups(kWarpSize);
  for (int64_t sample = groups.first; sample < batch; sample += groups.step) {
    double total = sum_of_column(squares + sample * chunks, static_cast<int>(chunks), groups.lane);
    if (groups.lane != 0) continue;
    const auto u = static_cast<double>(us[sample]);
    const double c_out = math::c_out(static_cast<double>(sigmas[sample]), sigma_data);
    total *= ::exp(-u) / (c_out * c_out);
    const auto count = static_cast<double>(numel);
    loss[sample] = static_cast<float>(total + count * u);
    grad_u[sample] = static_cast<float>(static_cast<double>(scale) * (count - total));
  }
}

}  // namespace edm2::cuda
