#include "edm2/mp_cat.h"

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

template <class T>
void scale(const T* __restrict x, T* __restrict y, Compute<T> weight, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(widen(x[i]) * weight);
}

/// MP-SiLU is taken of the product as stored: the backward pass sees no other.
template <class T>
void scale_silu(const T* __restrict x, T* __restrict y, T* __restrict y_silu, Compute<T> weight, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const Compute<T> v = stored<T>(widen(x[i]) * weight);
    y[i] = narrow<T>(v);
    y_silu[i] = narrow<T>(math::mp_silu(v));
  }
}

template <class T>
void scale_silu_backward(const T* __restrict grad, const T* __restrict grad_silu, const T* __restrict out,
                         T* __restrict grad_x, Compute<T> weight, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const Compute<T> g = widen(grad[i]) + widen(grad_silu[i]) * math::mp_silu_grad(widen(out[i]));
    grad_x[i] = narrow<T>(g * weight);
  }
}

/// Cuts elements [begin, end) of the concatenation into runs that lie in one input: f(is_b, offset in the output,
/// offset in the input, length).
template <class F>
EDM2_FORMULA void for_runs(int64_t size_a, int64_t size_b, int64_t begin, int64_t end, const F& f) {
  const int64_t size = size_a + size_b;
  int64_t row = begin / size;
  int64_t column = begin % size;
  for (int64_t at = begin; at < end; ++row, column = 0) {
    if (column < size_a) {
      const int64_t length = min(size_a - column, end - at);
      f(false, at, row * size_a + column, length);
      at += length;
      column += length;
    }
    if (at < end && column < size) {
      const int64_t length = min(size - column, end - at);
      f(true, at, row * size_b + column - size_a, length);
      at += length;
    }
  }
}

}  // namespace

void mp_cat(const MPCatParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    for_runs(p.size_a, p.size_b, begin, end, [&](bool is_b, int64_t at, int64_t from, int64_t length) {
      const T* x = as<T>(is_b ? p.b : p.a) + from;
      const C weight = static_cast<C>(is_b ? p.weight_b : p.weight_a);
      if (p.out_silu == nullptr) {
        scale(x, as<T>(p.out) + at, weight, length);
      } else {
        scale_silu(x, as<T>(p.out) + at, as<T>(p.out_silu) + at, weight, length);
      }
    });
  });
}

void mp_cat_backward(const MPCatBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    for_runs(p.size_a, p.size_b, begin, end, [&](bool is_b, int64_t at, int64_t to, int64_t length) {
      T* grad_x = as<T>(is_b ? p.grad_b : p.grad_a) + to;
      const C weight = static_cast<C>(is_b ? p.weight_b : p.weight_a);
      if (p.grad_silu == nullptr) {
        scale(as<T>(p.grad_out) + at, grad_x, weight, length);
      } else {
        scale_silu_backward(as<T>(p.grad_out) + at, as<T>(p.grad_silu) + at, as<T>(p.out) + at, grad_x, weight, length);
      }
    });
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
