#include "edm2/adam_step.h"

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// Elements of a parameter without rows worked on at a time, so that they stay in the cache.
constexpr int64_t kBlock = 2048;

/// Constants of a step in the type computed in.
template <class T>
struct Step {
  T inverse_loss_scale, step_size, bias_correction2, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, norm_eps;

  explicit Step(const AdamStepParams& p)
      : inverse_loss_scale(p.loss_scale == nullptr ? T(1) : T(1) / static_cast<T>(*p.loss_scale)),
        step_size(static_cast<T>(p.scalars[0])),
        bias_correction2(static_cast<T>(p.scalars[1])),
        beta1(static_cast<T>(p.beta1)),
        one_minus_beta1(static_cast<T>(1 - p.beta1)),
        beta2(static_cast<T>(p.beta2)),
        one_minus_beta2(static_cast<T>(1 - p.beta2)),
        eps(static_cast<T>(p.eps)),
        norm_eps(static_cast<T>(p.norm_eps)) {}
};

/// The gradient of an element without loss scale, or 0 if it is not finite.
template <class T>
EDM2_FORMULA T clean(T grad, T inverse_scale) {
  const T g = grad * inverse_scale;
  return g - g == T(0) ? g : T(0);
}

/// Adam and averages for `size` elements with gradient clean(grad) * of_grad - param * of_w.
template <class T>
void update(const AdamStepParams& p, const AdamTensor& t, const Step<T>& s, int64_t at, int64_t size, T of_grad,
            T of_w) {
  T* __restrict param = as<T>(t.param) + at;
  const T* __restrict grad = as<T>(t.grad) + at;
  T* __restrict exp_avg = as<T>(t.exp_avg) + at;
  T* __restrict exp_avg_sq = as<T>(t.exp_avg_sq) + at;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T g = clean(grad[i], s.inverse_loss_scale) * of_grad - param[i] * of_w;
    const T m = exp_avg[i] + s.one_minus_beta1 * (g - exp_avg[i]);
    const T v = s.beta2 * exp_avg_sq[i] + s.one_minus_beta2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] -= s.step_size * m / (std::sqrt(v) / s.bias_correction2 + s.eps);
  }
  for (int64_t k = 0; k < p.profiles; ++k) {  // written such that weight 1 gives param exactly
    T* __restrict ema = as<T>(t.emas[k]) + at;
    const T weight = static_cast<T>(p.scalars[2 + k]);
    const T rest = T(1) - weight;
    if (weight < T(0.5)) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) ema[i] += weight * (param[i] - ema[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) ema[i] = param[i] - rest * (param[i] - ema[i]);
    }
  }
}

template <class T>
void count_nonfinite(const T* grad, int64_t size, T inverse_scale, int64_t* counter) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < size; ++i) {
    const T g = grad[i] * inverse_scale;
    count += g - g == T(0) ? 0 : 1;
  }
  if (count > 0) __atomic_fetch_add(counter, count, __ATOMIC_RELAXED);
}

/// Sums of some elements are summed: one long sum would lose digits.
template <class T>
T rms_of(const T* w, int64_t size) {
  constexpr int64_t kElements = 512;
  T total = 0;
  for (int64_t first = 0; first < size; first += kElements) {
    const int64_t end = min(first + kElements, size);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < end; ++i) sum += w[i] * w[i];
    total += sum;
  }
  return std::sqrt(total / static_cast<T>(size));
}

/// The normalised row, forced or effective (spec 2.6), transposed as [size / inner, inner].
template <class T>
void prepare(const T* w, void* out, DType out_dtype, int64_t at, int64_t size, int64_t inner, T scale) {
  with_type(out_dtype, [&]<class Out>(Out) {
    Out* target = as<Out>(out) + at;
    const int64_t outer = size / inner;
    for (int64_t b = 0; b < inner; ++b) {
#pragma omp simd
      for (int64_t a = 0; a < outer; ++a) {
        target[b * outer + a] = narrow<Out>(static_cast<Compute<Out>>(w[a * inner + b] * scale));
      }
    }
  });
}

template <class T>
void step_row(const AdamStepParams& p, const AdamTensor& t, const Step<T>& s, int64_t row) {
  const int64_t size = t.row_size;
  const int64_t at = row * size;
  T* w = as<T>(t.param) + at;
  const T* grad = as<T>(t.grad) + at;
  count_nonfinite(grad, size, s.inverse_loss_scale, t.nonfinite);
  const double inverse_root = 1 / std::sqrt(static_cast<double>(size));
  T of_grad = 1;
  T of_w = 0;
  if (p.effective) {
    const T rms = rms_of(w, size);
    double dot = 0;  // <G, w>, in fp64: the rows' dots add up to the gain's gradient, and mostly cancel
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < size; ++i) {
      dot += static_cast<double>(clean(grad[i], s.inverse_loss_scale)) * static_cast<double>(w[i]);
    }
    const T gain = t.gain == nullptr ? T(1) : *static_cast<const T*>(t.gain);
    const T factor = gain * static_cast<T>(inverse_root);
    const T inverse = T(1) / (rms + s.norm_eps);
    of_grad = factor * inverse;
    of_w = factor * math::normalize_grad_coef(static_cast<T>(dot), inverse, rms, static_cast<T>(size));
    if (t.row_dots != nullptr) as<double>(t.row_dots)[row] = dot * static_cast<double>(inverse);
  }
  update(p, t, s, at, size, of_grad, of_w);
  if (p.force) {
    const T divisor = rms_of(w, size) + s.norm_eps;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) w[i] /= divisor;
  }
  if (t.prepared == nullptr || t.gain != nullptr) return;
  const T scale = static_cast<T>(inverse_root) / (rms_of(w, size) + s.norm_eps);
  prepare(w, t.prepared, t.prepared_dtype, at, size, t.inner, scale);
}

template <class T>
void step(const AdamStepParams& p, int64_t begin, int64_t end) {
  const Step<T> s(p);
  for (int64_t i = 0; i < p.num_tensors && p.offsets[i] < end; ++i) {
    const AdamTensor& t = p.tensors[i];
    if (p.offsets[i + 1] <= begin) continue;
    const int64_t first = max(begin - p.offsets[i], 0);
    const int64_t last = min(end, p.offsets[i + 1]) - p.offsets[i];
    if (t.weight) {
      const int64_t last_row = min(t.rows, (last + t.row_size - 1) / t.row_size);
      for (int64_t row = (first + t.row_size - 1) / t.row_size; row < last_row; ++row) step_row(p, t, s, row);
    } else {
      for (int64_t at = first; at < last; at += kBlock) {
        const int64_t size = min(kBlock, last - at);
        count_nonfinite(as<T>(t.grad) + at, size, s.inverse_loss_scale, t.nonfinite);
        update(p, t, s, at, size, T(1), T(0));
      }
    }
  }
}

}  // namespace

void adam_step(const AdamStepParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::kFloat64) {
    step<double>(p, begin, end);
  } else {
    step<float>(p, begin, end);
  }
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
