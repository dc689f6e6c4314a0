#include "edm2/mp_sum.h"

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

template <class T>
void sum(const T* __restrict a, const T* __restrict b, T* __restrict y, Compute<T> wa, Compute<T> wb, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(wa * widen(a[i]) + wb * widen(b[i]));
}

template <class T>
void sum_clamped(const T* __restrict a, const T* __restrict b, T* __restrict y, Compute<T> wa, Compute<T> wb,
                 Compute<T> clip, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(math::clamp(wa * widen(a[i]) + wb * widen(b[i]), clip));
}

template <class T>
void backward(const T* __restrict grad, T* __restrict grad_a, T* __restrict grad_b, Compute<T> wa, Compute<T> wb,
              int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const Compute<T> g = widen(grad[i]);
    grad_a[i] = narrow<T>(g * wa);
    grad_b[i] = narrow<T>(g * wb);
  }
}

/// The gradient passes where the sum lies within the bounds, these included (spec 2.13).
template <class T>
void backward_clamped(const T* __restrict grad, const T* __restrict a, const T* __restrict b, T* __restrict grad_a,
                      T* __restrict grad_b, Compute<T> wa, Compute<T> wb, Compute<T> clip, int64_t size) {
  using C = Compute<T>;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const C y = wa * widen(a[i]) + wb * widen(b[i]);
    const C g = math::where((y >= -clip) & (y <= clip), widen(grad[i]));
    grad_a[i] = narrow<T>(g * wa);
    grad_b[i] = narrow<T>(g * wb);
  }
}

}  // namespace

void mp_sum(const MPSumParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const C wa = static_cast<C>(p.weight_a), wb = static_cast<C>(p.weight_b), clip = static_cast<C>(p.clip);
    const T* a = as<T>(p.a) + begin;
    const T* b = as<T>(p.b) + begin;
    T* y = as<T>(p.y) + begin;
    if (std::isinf(p.clip)) {
      sum(a, b, y, wa, wb, end - begin);
    } else {
      sum_clamped(a, b, y, wa, wb, clip, end - begin);
    }
  });
}

void mp_sum_backward(const MPSumBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const C wa = static_cast<C>(p.weight_a), wb = static_cast<C>(p.weight_b), clip = static_cast<C>(p.clip);
    const T* grad = as<T>(p.grad_y) + begin;
    T* grad_a = as<T>(p.grad_a) + begin;
    T* grad_b = as<T>(p.grad_b) + begin;
    if (std::isinf(p.clip)) {
      backward(grad, grad_a, grad_b, wa, wb, end - begin);
    } else {
      backward_clamped(grad, as<T>(p.a) + begin, as<T>(p.b) + begin, grad_a, grad_b, wa, wb, clip, end - begin);
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
