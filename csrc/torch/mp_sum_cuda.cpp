#include <optional>

#include "cuda_support.h"
#include "mp_sum.h"

namespace edm2::torch_ops {
namespace {

Tensor mp_sum(const Tensor& a_, const Tensor& b_, double t, double clip) {
  const char* op = "mp_sum";
  const View a = dense(a_);
  check_same_gpu(a, View(b_), op, "b");
  const View b = dense(b_, a.format);
  const DType dtype = cuda_dtype_of(a, op, "a");
  const Tensor y = empty_like(a);
  const MPSumParams params = sum_params(a, b, y, t, clip, dtype, op);
  run_cuda(a, op, [&](CUstream_st* stream) { return cuda::launch_mp_sum(params, stream); });
  return y;
}

std::tuple<Tensor, Tensor> mp_sum_backward(const Tensor& grad, const Tensor& a_, const Tensor& b_, double t,
                                           double clip) {
  const char* op = "mp_sum_backward";
  const View a = dense(a_);
  const View grad_y = gradient_on_gpu(grad, a, op, "grad");
  std::optional<View> b;
  if (!std::isinf(clip)) b = gradient_on_gpu(b_, a, op, "b");
  const DType dtype = cuda_dtype_of(a, op, "a");
  const Tensor grad_a = empty_like(a);
  const Tensor grad_b = empty_like(a);
  const MPSumBackwardParams params =
      sum_backward_params(grad_y, a, b ? &*b : nullptr, grad_a, grad_b, t, clip, dtype, op);
  run_cuda(a, op, [&](CUstream_st* stream) { return cuda::launch_mp_sum_backward(params, stream); });
  return {grad_a, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("mp_sum", TORCH_BOX(&mp_sum));
  m.impl("mp_sum_backward", TORCH_BOX(&mp_sum_backward));
}

}  // namespace edm2::torch_ops
