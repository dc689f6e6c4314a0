#include "mp_sum.h"

#include <optional>

namespace edm2::torch_ops {
namespace {

Tensor mp_sum(const Tensor& a_, const Tensor& b_, double t, double clip) {
  const char* op = "mp_sum";
  const View a = dense(a_);
  const View b = dense(b_, a.format);
  const DType dtype = cpu_dtype_of(a, op, "a");
  const Tensor y = empty_like(a);
  run_cpu(cpu::mp_sum, sum_params(a, b, y, t, clip, dtype, op), a.numel, a.numel);
  return y;
}

std::tuple<Tensor, Tensor> mp_sum_backward(const Tensor& grad, const Tensor& a_, const Tensor& b_, double t,
                                           double clip) {
  const char* op = "mp_sum_backward";
  const View a = dense(a_);
  const View grad_y = gradient(grad, a, op, "grad");
  std::optional<View> b;
  if (!std::isinf(clip)) b = gradient(b_, a, op, "b");
  const DType dtype = cpu_dtype_of(a, op, "a");
  const Tensor grad_a = empty_like(a);
  const Tensor grad_b = empty_like(a);
  run_cpu(cpu::mp_sum_backward, sum_backward_params(grad_y, a, b ? &*b : nullptr, grad_a, grad_b, t, clip, dtype, op),
          a.numel, a.numel);
  return {grad_a, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("mp_sum", TORCH_BOX(&mp_sum));
  m.impl("mp_sum_backward", TORCH_BOX(&mp_sum_backward));
}

}  // namespace edm2::torch_ops
