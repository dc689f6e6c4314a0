#include "mp_sum.h"

namespace edm2::torch_ops {
namespace {

Tensor add_up(const Tensor& a_, const Tensor& b_, const Tensor* mask, double t, double clip, const char* op) {
  const View a = dense(a_);
  const View b = dense(b_, a.format);
  const DType dtype = cpu_dtype_of(a, op, "a");
  const Tensor y = empty_like(a);
  run_cpu(cpu::mp_sum, sum_params(a, b, y, mask, t, clip, dtype, op), sum_groups(a.numel), a.numel);
  return y;
}

Tensor mp_sum(const Tensor& a, const Tensor& b, double t, double clip) {
  return add_up(a, b, nullptr, t, clip, "mp_sum");
}

std::tuple<Tensor, Tensor> mp_sum_clipped(const Tensor& a, const Tensor& b, double t, double clip) {
  const Tensor mask = empty_mask(View(a));
  return {add_up(a, b, &mask, t, clip, "mp_sum_clipped"), mask};
}

std::tuple<Tensor, Tensor> mp_sum_backward(const Tensor& grad, const std::optional<Tensor>& more_grad,
                                           const std::optional<Tensor>& mask, double t, bool channels_last) {
  const char* op = "mp_sum_backward";
  const SumGradients of(grad, more_grad, mask, channels_last, op);
  const DType dtype = cpu_dtype_of(of.grad, op, "grad");
  const Tensor grad_a = of.empty_gradient(channels_last);
  const Tensor grad_b = of.empty_gradient(channels_last);
  run_cpu(cpu::mp_sum_backward, of.params(grad_a, grad_b, t, dtype), sum_groups(of.grad.numel), of.grad.numel);
  return {grad_a, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("mp_sum", TORCH_BOX(&mp_sum));
  m.impl("mp_sum_clipped", TORCH_BOX(&mp_sum_clipped));
  m.impl("mp_sum_backward", TORCH_BOX(&mp_sum_backward));
}

}  // namespace edm2::torch_ops
