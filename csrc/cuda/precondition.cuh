// Preconditioning (spec 3.4, Eqs. 4 to 8). A thread writes a pack of 16 bytes at a time, or single elements where
// samples are not made of packs, and gathers the values from the other layout.
#pragma once

#include "image.cuh"

namespace edm2::cuda {

/// c_in * image and ones in the channels past the image's if `input`, else c_out * image.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    precondition_scale_units(const float* __restrict__ images, const float* __restrict__ sigmas, T* __restrict__ out,
                             Image image, Image to, int64_t batch, bool input, bool sigma_per_sample,
                             double sigma_data) {
  for_each_unit<N>(batch, to.numel(), [&](const Unit& unit) {
    const float sigma = sigmas[sigma_per_sample ? unit.sample : 0];
    const float factor = input ? math::c_in(sigma, sigma_data) : math::c_out(sigma, sigma_data);
    const float* source = images + unit.sample * image.numel();
    const auto values = for_neighbours<N>(to, unit.first, [&](int64_t channel, int64_t pixel) {
      return channel < image.channels ? source[image.at(channel, pixel)] * factor : 1.0f;
    });
    store(out + unit.sample * to.numel() + unit.first, values);
  });
}

/// D = c_skip * x + c_out * F. x and D are alike.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    precondition_output_units(const float* __restrict__ x, const T* __restrict__ f, const float* __restrict__ sigmas,
                              float* __restrict__ out, Image image, Image raw, int64_t batch, bool sigma_per_sample,
                              double sigma_data) {
  for_each_unit<N>(batch, image.numel(), [&](const Unit& unit) {
    const float sigma = sigmas[sigma_per_sample ? unit.sample : 0];
    const int64_t start = unit.sample * image.numel();
    const auto gathered = for_neighbours<N>(
        image, unit.first, [&](int64_t channel, int64_t pixel) { return to_float(f[start + raw.at(channel, pixel)]); });
    const int64_t at = start + unit.first;
    store(out + at, load<N>(x + at) * math::c_skip(sigma, sigma_data) + gathered * math::c_out(sigma, sigma_data));
  });
}

}  // namespace edm2::cuda
