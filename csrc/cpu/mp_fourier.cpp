#include "edm2/mp_fourier.h"

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

constexpr int64_t kBlock = 256;
constexpr double kSqrt2 = 1.4142135623730951;

double exact_trig(bool sine, double x) { return sine ? __builtin_sin(x) : __builtin_cos(x); }

/// out[i] = sqrt(2) * cos(x * freqs[i] + phases[i]), or sin if Sine.
template <bool Sine, class C>
void waves(C x, const C* __restrict freqs, const C* __restrict phases, C* __restrict out, int64_t size) {
  constexpr C kLimit = std::is_same_v<C, float> ? C(math::kTrigLimitFloat) : C(math::kTrigLimitDouble);
  C largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < size; ++i) {
    const C angle = x * freqs[i] + phases[i];
    const C magnitude = angle < 0 ? -angle : angle;
    largest = magnitude > largest ? magnitude : largest;
    out[i] = C(kSqrt2) * math::trig<Sine>(angle);
  }
  if (largest > kLimit) {
    for (int64_t i = 0; i < size; ++i) {
      const C angle = x * freqs[i] + phases[i];
      out[i] = static_cast<C>(kSqrt2 * exact_trig(Sine, angle));
    }
  }
}

}  // namespace

void mp_fourier(const MPFourierParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    C block[kBlock];
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t first = 0; first < p.channels; first += kBlock) {
        const int64_t size = min(kBlock, p.channels - first);
        waves<false>(widen(as<T>(p.x)[n]), as<C>(p.freqs) + first, as<C>(p.phases) + first, block, size);
        T* y = as<T>(p.y) + n * p.channels + first;
        for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(block[i]);
      }
    }
  });
}

void mp_fourier_backward_x(const MPFourierBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    C block[kBlock];
    for (int64_t n = begin; n < end; ++n) {
      C grad_x = 0;
      for (int64_t first = 0; first < p.channels; first += kBlock) {
        const int64_t size = min(kBlock, p.channels - first);
        const T* grad = as<T>(p.grad_y) + n * p.channels + first;
        const C* freqs = as<C>(p.freqs) + first;
        waves<true>(widen(as<T>(p.x)[n]), freqs, as<C>(p.phases) + first, block, size);
#pragma omp simd reduction(+ : grad_x)
        for (int64_t i = 0; i < size; ++i) grad_x -= widen(grad[i]) * block[i] * freqs[i];
      }
      as<T>(p.grad_x)[n] = narrow<T>(grad_x);
    }
  });
}

void mp_fourier_backward_buffers(const MPFourierBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    C block[kBlock];
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t size = min(kBlock, end - first);
      C* grad_freqs = as<C>(p.grad_freqs) + first;
      C* grad_phases = as<C>(p.grad_phases) + first;
      for (int64_t i = 0; i < size; ++i) grad_freqs[i] = grad_phases[i] = 0;
      for (int64_t n = 0; n < p.batch; ++n) {
        const C x = widen(as<T>(p.x)[n]);
        const T* grad = as<T>(p.grad_y) + n * p.channels + first;
        waves<true>(x, as<C>(p.freqs) + first, as<C>(p.phases) + first, block, size);
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          const C grad_phase = -widen(grad[i]) * block[i];
          grad_phases[i] += grad_phase;
          grad_freqs[i] += grad_phase * x;
        }
      }
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
