// What the CPU and the CUDA half of MP-Cat share: checks, allocation, parameters.
#pragma once

#include "edm2/mp_cat.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common.h"

namespace edm2::torch_ops {

/// Eq. 103: the weights of a and b.
inline std::tuple<double, double> cat_weights(double t, int64_t channels_a, int64_t channels_b) {
  const double c = std::sqrt(static_cast<double>(channels_a + channels_b) / ((1 - t) * (1 - t) + t * t));
  return {c * (1 - t) / std::sqrt(static_cast<double>(channels_a)), c * t / std::sqrt(static_cast<double>(channels_b))};
}

/// Sets how the parts lie in the concatenation, and their weights.
template <class Params>
void set_rows(Params* params, const Activation& shape, int64_t channels_a, int64_t channels_b, double t) {
  const int64_t channel_size = shape.channels_last ? 1 : shape.pixels;  // elements of one channel in a row
  params->rows = shape.channels_last ? shape.batch * shape.pixels : shape.batch;
  params->size_a = channels_a * channel_size;
  params->size_b = channels_b * channel_size;
  std::tie(params->weight_a, params->weight_b) = cat_weights(t, channels_a, channels_b);
}

/// like's shape with another number of channels.
inline Tensor empty_with_channels(const View& like, int64_t channels, const char* op, const char* argument) {
  int64_t sizes[kMaxDim];
  EDM2_CHECK(like.dim <= kMaxDim, op, argument, "expected at most ", kMaxDim, " dimensions, got ", like.dim);
  std::copy(like.sizes, like.sizes + like.dim, sizes);
  sizes[1] = channels;
  return empty(like, sizes, like.dim, like.format, like.scalar_type);
}

/// Raises unless a tensor has a's shape with so many channels.
inline void check_images_of(const View& a, const View& got, int64_t channels, const char* op, const char* argument) {
  bool fits = got.dim == a.dim && got.sizes[1] == channels;
  for (int64_t i = 0; fits && i < a.dim; ++i) fits = i == 1 || a.sizes[i] == got.sizes[i];
  EDM2_CHECK(fits, op, argument, "expected ", channels, " channels and otherwise the shape of a, that is ", a.shape(),
             ", got ", got.shape());
}

/// The parameters of a call on a and b, b in a's format. Allocates the output, and that for MP-SiLU, unless null.
inline MPCatParams cat_params(const View& a, const View& b, double t, DType dtype, Tensor* out, Tensor* out_silu,
                              const char* op) {
  const Activation shape_a = activation_of(a, op, "a");
  const Activation shape_b = activation_of(b, op, "b");
  bool fits = a.dim == b.dim;
  for (int64_t i = 0; fits && i < a.dim; ++i) fits = i == 1 || a.sizes[i] == b.sizes[i];
  EDM2_CHECK(fits, op, "b", "expected the shape of a but for dimension 1, that is ", a.shape(), ", got ", b.shape());
  check_same_dtype(a, b, op, "b");
  EDM2_CHECK(shape_a.channels > 0 && shape_b.channels > 0, op, "a, b", "expected at least one channel each, got ",
             a.shape(), " and ", b.shape());
  const int64_t channels = shape_a.channels + shape_b.channels;
  if (out != nullptr) *out = empty_with_channels(a, channels, op, "a");
  if (out_silu != nullptr) *out_silu = empty_with_channels(a, channels, op, "a");
  MPCatParams params{};
  params.a = a.data();
  params.b = b.data();
  params.out = out != nullptr ? address(*out) : nullptr;
  params.out_silu = out_silu != nullptr ? address(*out_silu) : nullptr;
  params.dtype = dtype;
  set_rows(&params, shape_a, shape_a.channels, shape_b.channels, t);
  return params;
}

/// The same for the backward, grad_silu null if MP-SiLU was not emitted, and out if it was not stored. Allocates both
/// gradients.
inline MPCatBackwardParams cat_backward_params(const View& grad, const View* grad_silu, const View* out,
                                               int64_t channels_a, double t, DType dtype, Tensor* grad_a,
                                               Tensor* grad_b, const char* op) {
  const Activation shape = activation_of(grad, op, "grad");
  EDM2_CHECK(channels_a > 0 && channels_a < shape.channels, op, "channels_a", "expected 1 to ", shape.channels - 1,
             ", got ", channels_a);
  const int64_t channels_b = shape.channels - channels_a;
  *grad_a = empty_with_channels(grad, channels_a, op, "grad");
  *grad_b = empty_with_channels(grad, channels_b, op, "grad");
  MPCatBackwardParams params{};
  params.grad_out = grad.data();
  if (grad_silu != nullptr) params.grad_silu = grad_silu->data();
  if (out != nullptr) params.out = out->data();
  params.grad_a = address(*grad_a);
  params.grad_b = address(*grad_b);
  params.dtype = dtype;
  set_rows(&params, shape, channels_a, channels_b, t);
  return params;
}

}  // namespace edm2::torch_ops
