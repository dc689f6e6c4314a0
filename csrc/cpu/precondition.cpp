#include "edm2/precondition.h"

#include "image.h"
#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// d = c_skip * x + c_out * f.
template <class T>
void denoised(const Compute<T>* x, const T* f, int64_t f_step, Compute<T>* d, int64_t step, Compute<T> c_skip,
              Compute<T> c_out, int64_t count) {
  Compute<T> x_row[kTogether], d_row[kTogether];
  T f_row[kTogether];
  for (int64_t at = 0; at < count; at += kTogether) {
    const int64_t here = min(kTogether, count - at);
    const Compute<T>* xs = together(x + at * step, step, x_row, here);
    const T* fs = together(f + at * f_step, f_step, f_row, here);
    Compute<T>* to = step == 1 ? d + at : d_row;
#pragma omp simd
    for (int64_t i = 0; i < here; ++i) to[i] = c_skip * xs[i] + c_out * widen(fs[i]);
    if (step != 1) apart(d_row, d + at * step, step, here);
  }
}

}  // namespace

void precondition_scale(const PreconditionScaleParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const auto [batch, channels, pixels, channels_last] = p.shape;
    const Image from{channels, pixels, channels_last};
    const Image to{p.input ? channels + 1 : channels, pixels, p.out_channels_last};
    for_samples(pixels, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
      const C sigma = as<C>(p.sigma)[p.sigma_per_sample ? sample : 0];
      const C factor = p.input ? math::c_in(sigma, p.sigma_data) : math::c_out(sigma, p.sigma_data);
      const C* image = as<C>(p.image) + sample * from.numel();
      T* out = as<T>(p.out) + sample * to.numel();
      for (int64_t c = 0; c < channels; ++c) {
        scale(image + from.at(c, first), from.step(), out + to.at(c, first), to.step(), factor, count);
      }
      if (!p.input) return;
      T* ones = out + to.at(channels, first);
      for (int64_t i = 0; i < count; ++i) ones[i * to.step()] = narrow<T>(C(1));
    });
  });
}

void precondition_output(const PreconditionOutputParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const auto [batch, channels, pixels, channels_last] = p.shape;
    const Image image{channels, pixels, channels_last};
    const Image raw{channels, pixels, p.f_channels_last};
    for_samples(pixels, begin, end, [&](int64_t sample, int64_t first, int64_t count) {
      const C sigma = as<C>(p.sigma)[p.sigma_per_sample ? sample : 0];
      const C c_skip = math::c_skip(sigma, p.sigma_data), c_out = math::c_out(sigma, p.sigma_data);
      const int64_t start = sample * image.numel();
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = start + image.at(c, first);
        denoised(as<C>(p.x) + at, as<T>(p.f) + start + raw.at(c, first), raw.step(), as<C>(p.out) + at, image.step(),
                 c_skip, c_out, count);
      }
    });
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
