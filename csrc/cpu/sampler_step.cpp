#include "edm2/sampler_step.h"

#include "image.h"
#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// out over neighbours, `step` apart.
template <class C>
void update(const SamplerStepParams& p, const math::SamplerCoefficients<C>& k, int64_t at, int64_t step,
            int64_t count) {
  const C* x = as<C>(p.x) + at;
  const C* denoised = as<C>(p.denoised) + at;
  const C* guide = p.guide != nullptr ? as<C>(p.guide) + at : denoised;
  const C* start = p.start != nullptr ? as<C>(p.start) + at : x;
  C* __restrict out = as<C>(p.out) + at;
  for (int64_t i = 0; i < count * step; i += step) {
    out[i] = math::sampler_step(k, x[i], denoised[i], guide[i], start[i]);
  }
  if (p.noise == nullptr) return;
  const C* noise = as<C>(p.noise) + at;
  for (int64_t i = 0; i < count * step; i += step) out[i] += k.noise_scale * noise[i];
}

}  // namespace

void sampler_step(const SamplerStepParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const auto [batch, channels, pixels, channels_last] = p.shape;
    const Image image{channels, pixels, channels_last};
    const Image to{channels + 1, pixels, p.input_channels_last};
    const auto k =
        math::sampler_coefficients(*as<C>(p.t_hat), *as<C>(p.t_next), p.start != nullptr, static_cast<C>(p.guidance),
                                   static_cast<C>(p.churn), static_cast<C>(p.noise_scale), p.sigma_data);
    for_samples(pixels, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
      T* input = p.input != nullptr ? as<T>(p.input) + sample * to.numel() : nullptr;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = sample * image.numel() + image.at(c, first);
        update(p, k, at, image.step(), count);
        if (input != nullptr) {
          scale(as<C>(p.out) + at, image.step(), input + to.at(c, first), to.step(), k.c_in, count);
        }
      }
      if (input == nullptr) return;
      T* ones = input + to.at(channels, first);
      for (int64_t i = 0; i < count; ++i) ones[i * to.step()] = narrow<T>(C(1));
    });
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
