#include "edm2/normalize_weight.h"

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// Sums of some elements are summed: one long sum would lose digits.
template <class T>
Compute<T> sum_of_squares(const T* __restrict w, int64_t size) {
  constexpr int64_t kElements = 512;
  Compute<T> total = 0;
  for (int64_t first = 0; first < size; first += kElements) {
    const int64_t end = min(first + kElements, size);
    Compute<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < end; ++i) sum += widen(w[i]) * widen(w[i]);
    total += sum;
  }
  return total;
}

/// rms of a row, and s = eps + rms (spec 2.1).
template <class T>
struct RowNorm {
  using C = Compute<T>;
  C rms;
  C s;

  RowNorm(const T* w, int64_t size, double eps)
      : rms(std::sqrt(sum_of_squares(w, size) / static_cast<C>(size))), s(rms + static_cast<C>(eps)) {}
};

/// out = w / s * factor. in and out may be the same row. Rows of out are transposes of [size / inner, inner].
template <class T, class Out>
void normalize_row(const T* w, Out* out, int64_t size, int64_t inner, double eps, double factor) {
  using C = Compute<T>;
  const RowNorm<T> norm(w, size, eps);
  const C scale = static_cast<C>(factor) / norm.s;
  if (inner > 1) {
    const int64_t outer = size / inner;
    for (int64_t b = 0; b < inner; ++b) {
#pragma omp simd
      for (int64_t a = 0; a < outer; ++a) {
        out[b * outer + a] = narrow<Out>(static_cast<Compute<Out>>(widen(w[a * inner + b]) * scale));
      }
    }
  } else if (factor == 1.0) {  // exactly rounded division: forced normalisation is applied again and again
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] = narrow<Out>(static_cast<Compute<Out>>(widen(w[i]) / norm.s));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] = narrow<Out>(static_cast<Compute<Out>>(widen(w[i]) * scale));
  }
}

/// grad_w of one row (spec 2.6); returns <grad, y>.
template <class T, class Grad>
double normalize_row_backward(const Grad* __restrict grad, const T* __restrict w, T* __restrict grad_w, int64_t size,
                              double eps, double factor) {
  using C = Compute<T>;
  const RowNorm<T> norm(w, size, eps);
  double dot = 0;  // <grad, w>, in fp64: the rows' dots add up to the gain's gradient, and mostly cancel
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < size; ++i) dot += static_cast<double>(widen(grad[i])) * static_cast<double>(widen(w[i]));
  const C inv = C(1) / norm.s;
  const C f = static_cast<C>(factor);
  const C scale = f * inv;
  const C coef = f * math::normalize_grad_coef(static_cast<C>(dot), inv, norm.rms, static_cast<C>(size));
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    grad_w[i] = narrow<T>(static_cast<C>(widen(grad[i])) * scale - widen(w[i]) * coef);
  }
  return dot / norm.s;
}

/// f(tensor, row) for every row that begins in [begin, end).
template <class Tensor, class F>
EDM2_FORMULA void for_rows(const Tensor* tensors, const int64_t* offsets, int64_t num_tensors, int64_t begin,
                           int64_t end, const F& f) {
  for (int64_t t = 0; t < num_tensors && offsets[t] < end; ++t) {
    const int64_t size = tensors[t].row_size;
    if (size == 0 || offsets[t + 1] <= begin) continue;
    const int64_t first = (max(begin - offsets[t], 0) + size - 1) / size;
    const int64_t last = min(tensors[t].rows, (end - offsets[t] + size - 1) / size);
    for (int64_t row = first; row < last; ++row) f(tensors[t], row);
  }
}

}  // namespace

void normalize_weight(const NormalizeWeightParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    for_rows(p.tensors, p.offsets, p.num_tensors, begin, end, [&](const WeightRows& t, int64_t row) {
      T* w = as<T>(t.w) + row * t.row_size;
      if (p.force) normalize_row(w, w, t.row_size, 1, p.eps, 1.0);
      if (t.out == nullptr) return;
      with_type(t.out_dtype, [&]<class Out>(Out) {
        normalize_row(w, as<Out>(t.out) + row * t.row_size, t.row_size, t.inner, p.eps, t.factor);
      });
    });
  });
}

void normalize_weight_backward(const NormalizeWeightBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    with_type(p.grad_dtype, [&]<class Grad>(Grad) {
      for_rows(p.tensors, p.offsets, p.num_tensors, begin, end, [&](const WeightRowsBackward& t, int64_t row) {
        const int64_t at = row * t.row_size;
        const double dot = normalize_row_backward(as<Grad>(t.grad) + at, as<T>(t.w) + at, as<T>(t.grad_w) + at,
                                                  t.row_size, p.eps, t.factor);
        if (t.row_dots != nullptr) as<double>(t.row_dots)[row] = dot;
      });
    });
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
