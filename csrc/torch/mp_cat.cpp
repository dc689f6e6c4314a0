#include "edm2/mp_cat.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common.h"

namespace edm2::torch_ops {
namespace {

/// Eq. 103: the weights of a and b.
std::tuple<double, double> weights_of(double t, int64_t channels_a, int64_t channels_b) {
  const double c = std::sqrt(static_cast<double>(channels_a + channels_b) / ((1 - t) * (1 - t) + t * t));
  return {c * (1 - t) / std::sqrt(static_cast<double>(channels_a)), c * t / std::sqrt(static_cast<double>(channels_b))};
}

/// What lies together in memory: one sample's channels, or, channels_last, one pixel's.
struct Rows {
  int64_t rows;
  int64_t channel_size;  // elements of one channel in a row

  explicit Rows(const Activation& shape)
      : rows(shape.channels_last ? shape.batch * shape.pixels : shape.batch),
        channel_size(shape.channels_last ? 1 : shape.pixels) {}
};

Tensor cat(const Tensor& a_, const Tensor& b_, double t, Tensor* out_silu, const char* op) {
  const View a = dense(a_);
  const View b = dense(b_, a.format);
  const Activation shape_a = activation_of(a, op, "a");
  const Activation shape_b = activation_of(b, op, "b");
  bool fits = a.dim == b.dim;
  for (int64_t i = 0; fits && i < a.dim; ++i) fits = i == 1 || a.sizes[i] == b.sizes[i];
  EDM2_CHECK(fits, op, "b", "expected the shape of a but for dimension 1, that is ", a.shape(), ", got ", b.shape());
  check_same_dtype(a, b, op, "b");
  EDM2_CHECK(shape_a.channels > 0 && shape_b.channels > 0, op, "a, b", "expected at least one channel each, got ",
             a.shape(), " and ", b.shape());
  int64_t sizes[kMaxDim];
  EDM2_CHECK(a.dim <= kMaxDim, op, "a", "expected at most ", kMaxDim, " dimensions, got ", a.dim);
  std::copy(a.sizes, a.sizes + a.dim, sizes);
  sizes[1] = shape_a.channels + shape_b.channels;
  const DType dtype = cpu_dtype_of(a, op, "a");
  const Tensor out = empty(a, sizes, a.dim, a.format, a.scalar_type);
  const Rows rows(shape_a);
  MPCatParams params{};
  params.a = a.data();
  params.b = b.data();
  params.out = out.mutable_data_ptr();
  if (out_silu != nullptr) {
    *out_silu = empty(a, sizes, a.dim, a.format, a.scalar_type);
    params.out_silu = out_silu->mutable_data_ptr();
  }
  params.rows = rows.rows;
  params.size_a = shape_a.channels * rows.channel_size;
  params.size_b = shape_b.channels * rows.channel_size;
  params.dtype = dtype;
  std::tie(params.weight_a, params.weight_b) = weights_of(t, shape_a.channels, shape_b.channels);
  run_cpu(cpu::mp_cat, params, a.numel + b.numel, a.numel + b.numel, out_silu != nullptr ? 2 : 1);
  return out;
}

std::tuple<Tensor, Tensor> cat_backward(const View& grad, const View* grad_silu, const View* out, int64_t channels_a,
                                        double t, const char* op) {
  const Activation shape = activation_of(grad, op, "grad");
  EDM2_CHECK(channels_a > 0 && channels_a < shape.channels, op, "channels_a", "expected 1 to ", shape.channels - 1,
             ", got ", channels_a);
  EDM2_CHECK(grad.dim <= kMaxDim, op, "grad", "expected at most ", kMaxDim, " dimensions, got ", grad.dim);
  const DType dtype = cpu_dtype_of(grad, op, "grad");
  int64_t sizes[kMaxDim];
  std::copy(grad.sizes, grad.sizes + grad.dim, sizes);
  sizes[1] = channels_a;
  const Tensor grad_a = empty(grad, sizes, grad.dim, grad.format, grad.scalar_type);
  sizes[1] = shape.channels - channels_a;
  const Tensor grad_b = empty(grad, sizes, grad.dim, grad.format, grad.scalar_type);
  const Rows rows(shape);
  MPCatBackwardParams params{};
  params.grad_out = grad.data();
  if (grad_silu != nullptr) {
    params.grad_silu = grad_silu->data();
    params.out = out->data();
  }
  params.grad_a = grad_a.mutable_data_ptr();
  params.grad_b = grad_b.mutable_data_ptr();
  params.rows = rows.rows;
  params.size_a = channels_a * rows.channel_size;
  params.size_b = (shape.channels - channels_a) * rows.channel_size;
  params.dtype = dtype;
  std::tie(params.weight_a, params.weight_b) = weights_of(t, channels_a, shape.channels - channels_a);
  run_cpu(cpu::mp_cat_backward, params, grad.numel, grad.numel, grad_silu != nullptr ? 2 : 1);
  return {grad_a, grad_b};
}

Tensor mp_cat(const Tensor& a, const Tensor& b, double t) { return cat(a, b, t, nullptr, "mp_cat"); }

std::tuple<Tensor, Tensor> mp_cat_backward(const Tensor& grad, int64_t channels_a, double t) {
  return cat_backward(dense(grad), nullptr, nullptr, channels_a, t, "mp_cat_backward");
}

std::tuple<Tensor, Tensor> mp_cat_silu(const Tensor& a, const Tensor& b, double t) {
  Tensor out_silu;
  const Tensor out = cat(a, b, t, &out_silu, "mp_cat_silu");
  return {out, out_silu};
}

std::tuple<Tensor, Tensor> mp_cat_silu_backward(const Tensor& grad, const Tensor& grad_silu, const Tensor& out_,
                                                int64_t channels_a, double t) {
  const char* op = "mp_cat_silu_backward";
  const View out = dense(out_);
  const View grad_out = gradient(grad, out, op, "grad");
  const View grad_out_silu = gradient(grad_silu, out, op, "grad_silu");
  return cat_backward(grad_out, &grad_out_silu, &out, channels_a, t, op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("mp_cat", TORCH_BOX(&mp_cat));
  m.impl("mp_cat_backward", TORCH_BOX(&mp_cat_backward));
  m.impl("mp_cat_silu", TORCH_BOX(&mp_cat_silu));
  m.impl("mp_cat_silu_backward", TORCH_BOX(&mp_cat_silu_backward));
}

}  // namespace edm2::torch_ops
