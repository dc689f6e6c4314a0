#include <tuple>

#include "cuda_support.h"
#include "edm2/pixel_norm.h"

namespace edm2::torch_ops {
namespace {

/// y, and into *y_silu, unless that is null, its MP-SiLU.
Tensor forward(const Tensor& x_, Tensor* y_silu, double eps, const char* op) {
  const View x = dense(x_);
  PixelNormParams params{};
  params.shape = activation_of(x, op, "x");
  params.dtype = cuda_dtype_of(x, op, "x");
  params.eps = eps;
  const Tensor y = empty_like(x);
  if (y_silu != nullptr) *y_silu = empty_like(x);
  params.x = x.data();
  params.y = address(y);
  params.y_silu = y_silu != nullptr ? address(*y_silu) : nullptr;
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_pixel_norm(params, stream); });
  return y;
}

Tensor backward(const Tensor& grad, const Tensor* grad_silu, const Tensor& x_, double eps, const char* op) {
  const View x = dense(x_);
  PixelNormBackwardParams params{};
  params.shape = activation_of(x, op, "x");
  params.dtype = cuda_dtype_of(x, op, "x");
  params.eps = eps;
  const View grad_y = gradient_on_gpu(grad, x, op, "grad");
  const View grad_s = grad_silu != nullptr ? gradient_on_gpu(*grad_silu, x, op, "grad_silu") : grad_y;
  const Tensor grad_x = empty_like(x);
  params.grad_y = grad_y.data();
  params.grad_silu = grad_silu != nullptr ? grad_s.data() : nullptr;
  params.x = x.data();
  params.grad_x = address(grad_x);
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_pixel_norm_backward(params, stream); });
  return grad_x;
}

Tensor pixel_norm(const Tensor& x, double eps) { return forward(x, nullptr, eps, "pixel_norm"); }

Tensor pixel_norm_backward(const Tensor& grad, const Tensor& x, double eps) {
  return backward(grad, nullptr, x, eps, "pixel_norm_backward");
}

std::tuple<Tensor, Tensor> pixel_norm_silu(const Tensor& x, double eps) {
  Tensor y_silu;
  const Tensor y = forward(x, &y_silu, eps, "pixel_norm_silu");
  return {y, y_silu};
}

Tensor pixel_norm_silu_backward(const Tensor& grad, const Tensor& grad_silu, const Tensor& x, double eps) {
  return backward(grad, &grad_silu, x, eps, "pixel_norm_silu_backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("pixel_norm", TORCH_BOX(&pixel_norm));
  m.impl("pixel_norm_backward", TORCH_BOX(&pixel_norm_backward));
  m.impl("pixel_norm_silu", TORCH_BOX(&pixel_norm_silu));
  m.impl("pixel_norm_silu_backward", TORCH_BOX(&pixel_norm_silu_backward));
}

}  // namespace edm2::torch_ops
