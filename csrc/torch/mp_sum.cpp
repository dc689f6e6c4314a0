#include "edm2/mp_sum.h"

#include <cmath>
#include <tuple>

#include "common.h"

namespace edm2::torch_ops {
namespace {

/// Eq. 88: the weights of a and b.
std::tuple<double, double> weights_of(double t) {
  const double k = std::sqrt((1 - t) * (1 - t) + t * t);
  return {(1 - t) / k, t / k};
}

void check_clip(double clip, const char* op) { EDM2_CHECK(clip >= 0, op, "clip", "expected at least 0, got ", clip); }

Tensor mp_sum(const Tensor& a_, const Tensor& b_, double t, double clip) {
  const char* op = "mp_sum";
  const View a = dense(a_);
  const View b = dense(b_, a.format);
  check_like(a, b, op, "b");
  check_clip(clip, op);
  const DType dtype = cpu_dtype_of(a, op, "a");
  const auto [weight_a, weight_b] = weights_of(t);
  const Tensor y = empty_like(a);
  const MPSumParams params{a.data(), b.data(), y.mutable_data_ptr(), a.numel, dtype, weight_a, weight_b, clip};
  run_cpu(cpu::mp_sum, params, a.numel, a.numel);
  return y;
}

std::tuple<Tensor, Tensor> mp_sum_backward(const Tensor& grad, const Tensor& a_, const Tensor& b_, double t,
                                           double clip) {
  const char* op = "mp_sum_backward";
  const View a = dense(a_);
  const View grad_y = gradient(grad, a, op, "grad");
  check_clip(clip, op);
  const auto [weight_a, weight_b] = weights_of(t);
  const Tensor grad_a = empty_like(a);
  const Tensor grad_b = empty_like(a);
  MPSumBackwardParams params{};
  params.grad_y = grad_y.data();
  params.grad_a = grad_a.mutable_data_ptr();
  params.grad_b = grad_b.mutable_data_ptr();
  params.numel = a.numel;
  params.dtype = cpu_dtype_of(a, op, "a");
  params.weight_a = weight_a;
  params.weight_b = weight_b;
  params.clip = clip;
  if (std::isinf(clip)) {
    run_cpu(cpu::mp_sum_backward, params, a.numel, a.numel);
  } else {
    const View b = gradient(b_, a, op, "b");
    params.a = a.data();
    params.b = b.data();
    run_cpu(cpu::mp_sum_backward, params, a.numel, a.numel);
  }
  return {grad_a, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("mp_sum", TORCH_BOX(&mp_sum));
  m.impl("mp_sum_backward", TORCH_BOX(&mp_sum_backward));
}

}  // namespace edm2::torch_ops
