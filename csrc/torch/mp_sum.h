// What the CPU and the CUDA half of MP-Sum share.
#pragma once

#include "edm2/mp_sum.h"

#include <cmath>
#include <optional>
#include <tuple>

#include "common.h"

namespace edm2::torch_ops {

/// Eq. 88: the weights of a and b.
inline std::tuple<double, double> sum_weights(double t) {
  const double k = std::sqrt((1 - t) * (1 - t) + t * t);
  return {(1 - t) / k, t / k};
}

inline int64_t sum_groups(int64_t numel) { return (numel + kMaskedTogether - 1) / kMaskedTogether; }

/// Room for the mask of the sum of a and something.
inline Tensor empty_mask(const View& a) {
  const int64_t bytes = sum_groups(a.numel);
  return empty(a, &bytes, 1, Format::kContiguous, ScalarType::Byte);
}

/// The parameters of a call on a and b, which are alike, into y and, unless it is null, the mask.
inline MPSumParams sum_params(const View& a, const View& b, const Tensor& y, const Tensor* mask, double t, double clip,
                              DType dtype, const char* op) {
  check_like(a, b, op, "b");
  EDM2_CHECK(clip >= 0, op, "clip", "expected at least 0, got ", clip);
  const auto [weight_a, weight_b] = sum_weights(t);
  auto* const bits = mask == nullptr ? nullptr : static_cast<uint8_t*>(address(*mask));
  return {a.data(), b.data(), address(y), bits, a.numel, dtype, weight_a, weight_b, clip};
}

/// What the backward reads, checked, in the format of the sum.
struct SumGradients {
  View grad;
  std::optional<View> more;
  std::optional<View> mask;

  SumGradients(const Tensor& grad_, const std::optional<Tensor>& more_, const std::optional<Tensor>& mask_,
               bool channels_last, const char* op)
      : grad(grad_) {
    const Format format = channels_last ? Format::kChannelsLast : Format::kContiguous;
    EDM2_CHECK(!channels_last || grad.dim == 4 || grad.dim == 5, op, "grad",
               "expected 4 or 5 dimensions for channels_last, got shape ", grad.shape());
    grad = dense(grad_, format);
    if (more_) {
      more = dense(*more_, format);
      check_like(grad, *more, op, "more_grad");
    }
    if (mask_) {
      mask = dense(*mask_, Format::kContiguous);
      EDM2_CHECK(mask->scalar_type == ScalarType::Byte && mask->numel == sum_groups(grad.numel), op, "mask",
                 "expected ", sum_groups(grad.numel), " bytes, got ", to_string(mask->scalar_type), " of shape ",
                 mask->shape());
    }
  }

  Tensor empty_gradient(bool channels_last) const {
    const Format format = channels_last ? Format::kChannelsLast : Format::kContiguous;
    return empty(grad, grad.sizes, grad.dim, format, grad.scalar_type);
  }

  MPSumBackwardParams params(const Tensor& grad_a, const Tensor& grad_b, double t, DType dtype) const {
    const auto [weight_a, weight_b] = sum_weights(t);
    return {grad.data(),
            more ? more->data() : nullptr,
            mask ? static_cast<const uint8_t*>(mask->data()) : nullptr,
            address(grad_a),
            address(grad_b),
            grad.numel,
            dtype,
            weight_a,
            weight_b};
  }
};

}  // namespace edm2::torch_ops
