#include "edm2/pixel_norm.h"

#include <tuple>

#include "common.h"

namespace edm2::torch_ops {
namespace {

void forward(const View& x, const Tensor& y, const Tensor* y_silu, double eps, const char* op) {
  PixelNormParams params{};
  params.x = x.data();
  params.y = y.mutable_data_ptr();
  params.y_silu = y_silu != nullptr ? y_silu->mutable_data_ptr() : nullptr;
  params.shape = activation_of(x, op, "x");
  params.dtype = cpu_dtype_of(x, op, "x");
  params.eps = eps;
  run_cpu(cpu::pixel_norm, params, params.shape.batch * params.shape.pixels, x.numel, y_silu != nullptr ? 2 : 1);
}

Tensor backward(const Tensor& grad, const Tensor* grad_silu, const Tensor& x_, double eps, const char* op) {
  const View x = dense(x_);
  PixelNormBackwardParams params{};
  params.shape = activation_of(x, op, "x");
  params.dtype = cpu_dtype_of(x, op, "x");
  params.eps = eps;
  const View grad_y = gradient(grad, x, op, "grad");
  const View grad_s = grad_silu != nullptr ? gradient(*grad_silu, x, op, "grad_silu") : grad_y;
  const Tensor grad_x = empty_like(x);
  params.grad_y = grad_y.data();
  params.grad_silu = grad_silu != nullptr ? grad_s.data() : nullptr;
  params.x = x.data();
  params.grad_x = grad_x.mutable_data_ptr();
  run_cpu(cpu::pixel_norm_backward, params, params.shape.batch * params.shape.pixels, x.numel,
          grad_silu != nullptr ? 2 : 1);
  return grad_x;
}

Tensor pixel_norm(const Tensor& x_, double eps) {
  const View x = dense(x_);
  const Tensor y = empty_like(x);
  forward(x, y, nullptr, eps, "pixel_norm");
  return y;
}

Tensor pixel_norm_backward(const Tensor& grad, const Tensor& x, double eps) {
  return backward(grad, nullptr, x, eps, "pixel_norm_backward");
}

std::tuple<Tensor, Tensor> pixel_norm_silu(const Tensor& x_, double eps) {
  const View x = dense(x_);
  const Tensor y = empty_like(x);
  const Tensor y_silu = empty_like(x);
  forward(x, y, &y_silu, eps, "pixel_norm_silu");
  return {y, y_silu};
}

Tensor pixel_norm_silu_backward(const Tensor& grad, const Tensor& grad_silu, const Tensor& x, double eps) {
  return backward(grad, &grad_silu, x, eps, "pixel_norm_silu_backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("pixel_norm", TORCH_BOX(&pixel_norm));
  m.impl("pixel_norm_backward", TORCH_BOX(&pixel_norm_backward));
  m.impl("pixel_norm_silu", TORCH_BOX(&pixel_norm_silu));
  m.impl("pixel_norm_silu_backward", TORCH_BOX(&pixel_norm_silu_backward));
}

}  // namespace edm2::torch_ops
