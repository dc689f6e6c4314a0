#include "mp_sum.h"

#include "cuda_support.h"

namespace edm2::torch_ops {
namespace {

Tensor add_up(const Tensor& a_, const Tensor& b_, const Tensor* mask, double t, double clip, const char* op) {
  const View a = dense(a_);
  check_same_gpu(a, View(b_), op, "b");
  const View b = dense(b_, a.format);
  const DType dtype = cuda_dtype_of(a, op, "a");
  const Tensor y = empty_like(a);
  const MPSumParams params = sum_params(a, b, y, mask, t, clip, dtype, op);
  run_cuda(a, op, [&](CUstream_st* stream) { return cuda::launch_mp_sum(params, stream); });
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
  if (more_grad) check_same_gpu(View(grad), View(*more_grad), op, "more_grad");
  if (mask) check_same_gpu(View(grad), View(*mask), op, "mask");
  const SumGradients of(grad, more_grad, mask, channels_last, op);
  const DType dtype = cuda_dtype_of(of.grad, op, "grad");
  const Tensor grad_a = of.empty_gradient(channels_last);
  const Tensor grad_b = of.empty_gradient(channels_last);
  const MPSumBackwardParams params = of.params(grad_a, grad_b, t, dtype);
  run_cuda(of.grad, op, [&](CUstream_st* stream) { return cuda::launch_mp_sum_backward(params, stream); });
  return {grad_a, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("mp_sum", TORCH_BOX(&mp_sum));
  m.impl("mp_sum_clipped", TORCH_BOX(&mp_sum_clipped));
  m.impl("mp_sum_backward", TORCH_BOX(&mp_sum_backward));
}

}  // namespace edm2::torch_ops
