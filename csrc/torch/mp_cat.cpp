#include "mp_cat.h"

namespace edm2::torch_ops {
namespace {

Tensor cat(const Tensor& a_, const Tensor& b_, double t, Tensor* out_silu, const char* op) {
  const View a = dense(a_);
  const View b = dense(b_, a.format);
  Tensor out;
  const MPCatParams params = cat_params(a, b, t, cpu_dtype_of(a, op, "a"), &out, out_silu, op);
  run_cpu(cpu::mp_cat, params, a.numel + b.numel, a.numel + b.numel, out_silu != nullptr ? 2 : 1);
  return out;
}

std::tuple<Tensor, Tensor> cat_backward(const View& grad, const View* grad_silu, const View* out, int64_t channels_a,
                                        double t, const char* op) {
  Tensor grad_a;
  Tensor grad_b;
  const DType dtype = cpu_dtype_of(grad, op, "grad");
  const MPCatBackwardParams params =
      cat_backward_params(grad, grad_silu, out, channels_a, t, dtype, &grad_a, &grad_b, op);
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
