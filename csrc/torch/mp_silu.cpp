#include "edm2/mp_silu.h"

#include <tuple>

#include "common.h"
#include "dropout.h"

namespace edm2::torch_ops {
namespace {

/// c [batch, channels] of x's dtype.
View modulation(const Tensor& c_, const View& x, const Activation& shape, const char* op) {
  const View c = dense(c_, Format::kContiguous);
  EDM2_CHECK(c.dim == 2 && c.sizes[0] == shape.batch && c.sizes[1] == shape.channels, op, "c", "expected shape [",
             shape.batch, ", ", shape.channels, "], got ", c.shape());
  check_same_dtype(x, c, op, "c");
  return c;
}

Tensor mp_silu(const Tensor& x_) {
  const View x = dense(x_);
  MPSiLUParams params{x.data(), nullptr, x.numel, cpu_dtype_of(x, "mp_silu", "x")};
  const Tensor y = empty_like(x);
  params.y = y.mutable_data_ptr();
  run_cpu(cpu::mp_silu, params, x.numel, x.numel);
  return y;
}

Tensor mp_silu_backward(const Tensor& grad, const Tensor& x_) {
  const char* op = "mp_silu_backward";
  const View x = dense(x_);
  const View grad_y = gradient(grad, x, op, "grad");
  MPSiLUBackwardParams params{grad_y.data(), x.data(), nullptr, x.numel, cpu_dtype_of(x, op, "x")};
  const Tensor grad_x = empty_like(x);
  params.grad_x = grad_x.mutable_data_ptr();
  run_cpu(cpu::mp_silu_backward, params, x.numel, x.numel);
  return grad_x;
}

Tensor modulated(const Tensor& x_, const Tensor& c_, const Dropout& dropout, const char* op) {
  const View x = dense(x_);
  const Activation shape = activation_of(x, op, "x");
  const View c = modulation(c_, x, shape, op);
  MPSiLUModulatedParams params{x.data(), c.data(), nullptr, shape, cpu_dtype_of(x, op, "x"), dropout};
  const Tensor y = empty_like(x);
  params.y = y.mutable_data_ptr();
  const int64_t items = shape.batch * (shape.channels_last ? shape.pixels : shape.channels);
  run_cpu(cpu::mp_silu_modulated, params, items, x.numel);
  return y;
}

std::tuple<Tensor, Tensor> modulated_backward(const Tensor& grad, const Tensor& x_, const Tensor& c_,
                                              const Dropout& dropout, const char* op) {
  const View x = dense(x_);
  const Activation shape = activation_of(x, op, "x");
  const View c = modulation(c_, x, shape, op);
  const View grad_y = gradient(grad, x, op, "grad");
  const DType dtype = cpu_dtype_of(x, op, "x");
  const Tensor grad_x = empty_like(x);
  const Tensor grad_c = empty_like(c);
  const MPSiLUModulatedBackwardParams params{
      grad_y.data(), x.data(), c.data(), grad_x.mutable_data_ptr(), grad_c.mutable_data_ptr(), shape, dtype, dropout};
  // Without pixels there still is a sum over them.
  run_cpu(cpu::mp_silu_modulated_backward, params, cpu::mp_silu_modulated_backward_items(shape), x.numel + c.numel);
  return {grad_x, grad_c};
}

Tensor mp_silu_modulated(const Tensor& x, const Tensor& c) { return modulated(x, c, {}, "mp_silu_modulated"); }

std::tuple<Tensor, Tensor> mp_silu_modulated_backward(const Tensor& grad, const Tensor& x, const Tensor& c) {
  return modulated_backward(grad, x, c, {}, "mp_silu_modulated_backward");
}

Tensor mp_silu_modulated_dropout(const Tensor& x, const Tensor& c, const Tensor& philox, int64_t subsequence,
                                 int64_t threshold) {
  const char* op = "mp_silu_modulated_dropout";
  const View seed = dense(philox);
  return modulated(x, c, dropout_of(seed, subsequence, threshold, x, op), op);
}

std::tuple<Tensor, Tensor> mp_silu_modulated_dropout_backward(const Tensor& grad, const Tensor& x, const Tensor& c,
                                                              const Tensor& philox, int64_t subsequence,
                                                              int64_t threshold) {
  const char* op = "mp_silu_modulated_dropout_backward";
  const View seed = dense(philox);
  return modulated_backward(grad, x, c, dropout_of(seed, subsequence, threshold, x, op), op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("mp_silu", TORCH_BOX(&mp_silu));
  m.impl("mp_silu_backward", TORCH_BOX(&mp_silu_backward));
  m.impl("mp_silu_modulated", TORCH_BOX(&mp_silu_modulated));
  m.impl("mp_silu_modulated_backward", TORCH_BOX(&mp_silu_modulated_backward));
  m.impl("mp_silu_modulated_dropout", TORCH_BOX(&mp_silu_modulated_dropout));
  m.impl("mp_silu_modulated_dropout_backward", TORCH_BOX(&mp_silu_modulated_dropout_backward));
}

}  // namespace edm2::torch_ops
