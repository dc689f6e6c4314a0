// One Euler or Heun step of the sampler with guidance, the noise of the step after it, and what the U-Net sees of the
// result (spec 6.1, 6.2). A thread owns a pack of x, or a single element where samples are not made of packs, and
// scatters the network's input into its own layout.
#pragma once

#include "edm2/sampler_step.h"
#include "image.cuh"

namespace edm2::cuda {

/// Tensors of the state's layout; null where there is none.
struct SamplerTensors {
  const float* x;
  const float* denoised;
  const float* guide;
  const float* start;
  const float* noise;
  float* out;
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    sampler_step_units(SamplerTensors state, const float* __restrict__ t_hat, const float* __restrict__ t_next,
                       T* __restrict__ input, Image image, Image to, int64_t batch, float guidance, float churn,
                       float noise_scale, double sigma_data) {
  const auto k =
      math::sampler_coefficients(*t_hat, *t_next, state.start != nullptr, guidance, churn, noise_scale, sigma_data);
  for_each_unit<N>(batch, image.numel(), [&](const Unit& unit) {
    const int64_t at = unit.sample * image.numel() + unit.first;
    const auto x = load<N>(state.x + at);
    const auto denoised = load<N>(state.denoised + at);
    const auto guide = state.guide != nullptr ? load<N>(state.guide + at) : denoised;
    const auto start = state.start != nullptr ? load<N>(state.start + at) : x;
    Floats<N> next;
#pragma unroll
    for (int i = 0; i < N; ++i) next.v[i] = math::sampler_step(k, x.v[i], denoised.v[i], guide.v[i], start.v[i]);
    if (state.noise != nullptr) next = next + load<N>(state.noise + at) * k.noise_scale;
    store(state.out + at, next);
    if (input == nullptr) return;
    T* target = input + unit.sample * to.numel();
    for_each_neighbour<N>(image, unit.first, [&](int i, int64_t channel, int64_t pixel) {
      target[to.at(channel, pixel)] = from_float<T>(next.v[i] * k.c_in);
      if (channel == 0) target[to.at(image.channels, pixel)] = from_float<T>(1.0f);
    });
  });
}

}  // namespace edm2::cuda
