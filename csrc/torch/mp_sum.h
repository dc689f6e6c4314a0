// What the CPU and the CUDA half of MP-Sum share.
#pragma once

#include "edm2/mp_sum.h"

#include <cmath>
#include <tuple>

#include "common.h"

namespace edm2::torch_ops {

/// Eq. 88: the weights of a and b.
inline std::tuple<double, double> sum_weights(double t) {
  const double k = std::sqrt((1 - t) * (1 - t) + t * t);
  return {(1 - t) / k, t / k};
}

/// The parameters of a call on a and b, which are alike, into y.
inline MPSumParams sum_params(const View& a, const View& b, const Tensor& y, double t, double clip, DType dtype,
                              const char* op) {
  check_like(a, b, op, "b");
  EDM2_CHECK(clip >= 0, op, "clip", "expected at least 0, got ", clip);
  const auto [weight_a, weight_b] = sum_weights(t);
  return {a.data(), b.data(), address(y), a.numel, dtype, weight_a, weight_b, clip};
}

/// The same for the backward. b, of a's shape, is null unless clip is finite: else neither input is read.
inline MPSumBackwardParams sum_backward_params(const View& grad_y, const View& a, const View* b, const Tensor& grad_a,
                                               const Tensor& grad_b, double t, double clip, DType dtype,
                                               const char* op) {
  EDM2_CHECK(clip >= 0, op, "clip", "expected at least 0, got ", clip);
  const auto [weight_a, weight_b] = sum_weights(t);
  return {grad_y.data(),
          b != nullptr ? a.data() : nullptr,
          b != nullptr ? b->data() : nullptr,
          address(grad_a),
          address(grad_b),
          a.numel,
          dtype,
          weight_a,
          weight_b,
          clip};
}

}  // namespace edm2::torch_ops
