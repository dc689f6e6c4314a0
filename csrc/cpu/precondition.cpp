#include "edm2/precondition.h"

#include "image.h"
#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

template <class T>
void scale(const Compute<T>* __restrict x, int64_t x_step, T* __restrict y, int64_t y_step, Compute<T> factor,
           int64_t count) {
  if (x_step == 1 && y_step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = narrow<T>(x[i] * factor);
  } else {
    for (int64_t i = 0; i < count; ++i) y[i * y_step] = narrow<T>(x[i * x_step] * factor);
  }
}

template <class T>
void denoised(const Compute<T>* __restrict x, const T* __restrict f, int64_t f_step, Compute<T>* __restrict d,
              int64_t step, Compute<T> c_skip, Compute<T> c_out, int64_t count) {
  if (step == 1 && f_step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) d[i] = c_skip * x[i] + c_out * widen(f[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) d[i * step] = c_skip * x[i * step] + c_out * widen(f[i * f_step]);
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
