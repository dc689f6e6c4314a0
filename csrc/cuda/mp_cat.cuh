// MP-Cat (Eq. 103), concat(weight_a * a, weight_b * b) along channels, with MP-SiLU of the result or that only, and its
// backward.
//
// The grid walks over the concatenation in units of a 16-byte pack, or of one element where the inputs' rows are not
// made of packs. A unit lies in one input as a whole, so that everything is read and written in order.
#pragma once

#include "device.cuh"

namespace edm2::cuda {

/// Rows of the concatenation and of its two parts, in units.
struct CatRows {
  int64_t rows;
  int64_t size_a;
  int64_t size_b;
};

/// One thread's way over the concatenation, from its first unit on by the number of all threads. Divides only at the
/// start.
class CatWalk {
 public:
  __device__ explicit CatWalk(const CatRows& of)
      : size_a_(of.size_a),
        size_b_(of.size_b),
        end_(of.rows * (of.size_a + of.size_b)),
        step_(gridDim.x * int64_t{kThreads}),
        step_rows_(step_ / (of.size_a + of.size_b)),
        at_(blockIdx.x * int64_t{kThreads} + threadIdx.x),
        row_(at_ / (of.size_a + of.size_b)) {}

  __device__ bool done() const { return at_ >= end_; }
  /// Of the concatenation.
  __device__ int64_t unit() const { return at_; }
  __device__ bool in_a() const { return at_ - row_ * (size_a_ + size_b_) < size_a_; }
  /// Of the part that the unit belongs to.
  __device__ int64_t unit_of_part() const { return in_a() ? at_ - row_ * size_b_ : at_ - (row_ + 1) * size_a_; }

  __device__ void advance() {
    at_ += step_;
    row_ += step_rows_;
    if (at_ - row_ * (size_a_ + size_b_) >= size_a_ + size_b_) ++row_;
  }

 private:
  int64_t size_a_;
  int64_t size_b_;
  int64_t end_;
  int64_t step_;
  int64_t step_rows_;
  int64_t at_;
  int64_t row_;
};

/// The values as they read back after being stored.
template <typename T, int N>
__device__ Floats<N> rounded(const Floats<N>& values) {
  return map([](float v) { return to_float(from_float<T>(v)); }, values);
}

/// Of out and out_silu either may be null. MP-SiLU is taken of the product as stored: the backward sees no other.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    mp_cat_units(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, T* __restrict__ out_silu,
                 CatRows rows, float weight_a, float weight_b) {
  for (CatWalk walk(rows); !walk.done(); walk.advance()) {
    const T* part = walk.in_a() ? a : b;
    const float weight = walk.in_a() ? weight_a : weight_b;
    const auto y = rounded<T>(load<N>(part + walk.unit_of_part() * N) * weight);
    if (out != nullptr) store(out + walk.unit() * N, y);
    if (out_silu != nullptr) store(out_silu + walk.unit() * N, mp_silu(y));
  }
}

/// grad_silu is null if MP-SiLU was not emitted; else out is, or, if it is null, a and b are read instead.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    mp_cat_backward_units(const T* __restrict__ grad_out, const T* __restrict__ grad_silu, const T* __restrict__ out,
                          const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ grad_a,
                          T* __restrict__ grad_b, CatRows rows, float weight_a, float weight_b) {
  for (CatWalk walk(rows); !walk.done(); walk.advance()) {
    const int64_t at = walk.unit() * N;
    const int64_t at_part = walk.unit_of_part() * N;
    const float weight = walk.in_a() ? weight_a : weight_b;
    auto grad = load<N>(grad_out + at);
    if (grad_silu != nullptr) {
      const T* part = walk.in_a() ? a : b;
      const auto y = out != nullptr ? load<N>(out + at) : rounded<T>(load<N>(part + at_part) * weight);
      grad = grad + load<N>(grad_silu + at) * mp_silu_grad(y);
    }
    store((walk.in_a() ? grad_a : grad_b) + at_part, grad * weight);
  }
}

}  // namespace edm2::cuda
