#include "edm2/denoising_loss.h"

#include "image.h"
#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// What the loss of one sample is made of.
template <class C>
struct Coefficients {
  C c_skip;
  C c_out;
  C grad;  // of (D - y) in the gradient of F: 2 scale (lambda / exp(u)) c_out
};

/// The sum of (D - y)^2 over neighbours, and their gradient.
template <class T>
double errors(const Compute<T>* __restrict x, const Compute<T>* __restrict y, int64_t step, const T* __restrict f,
              T* __restrict grad_f, int64_t f_step, const Coefficients<Compute<T>>& k, int64_t count) {
  double squares = 0.0;
  const auto add = [&](int64_t i) {
    const Compute<T> error = k.c_skip * x[i * step] + k.c_out * widen(f[i * f_step]) - y[i * step];
    grad_f[i * f_step] = narrow<T>(k.grad * error);
    return static_cast<double>(error) * static_cast<double>(error);
  };
  for (int64_t i = 0; i < count; ++i) squares += add(i);
  return squares;
}

}  // namespace

void denoising_loss(const DenoisingLossParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const auto [batch, channels, pixels, channels_last] = p.shape;
    const Image image{channels, pixels, channels_last};
    const Image raw{channels, pixels, p.f_channels_last};
    for (int64_t sample = begin; sample < end; ++sample) {
      const C sigma = as<C>(p.sigma)[sample];
      const C u = as<C>(p.u)[sample];
      const C c_out = math::c_out(sigma, p.sigma_data);
      const Coefficients<C> k{math::c_skip(sigma, p.sigma_data), c_out,
                              C(2) * static_cast<C>(p.scale) * std::exp(-u) / c_out};
      const int64_t start = sample * image.numel();
      double squares = 0.0;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = start + image.at(c, 0), at_f = start + raw.at(c, 0);
        squares += errors(as<C>(p.x) + at, as<C>(p.y) + at, image.step(), as<T>(p.f) + at_f, as<T>(p.grad_f) + at_f,
                          raw.step(), k, pixels);
      }
      const auto numel = static_cast<double>(image.numel());
      const double exact_c_out = math::c_out(static_cast<double>(sigma), p.sigma_data);
      const double weighted = squares * std::exp(-static_cast<double>(u)) / (exact_c_out * exact_c_out);
      as<C>(p.loss)[sample] = static_cast<C>(weighted + numel * static_cast<double>(u));
      as<C>(p.grad_u)[sample] = static_cast<C>(p.scale * (numel - weighted));
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
