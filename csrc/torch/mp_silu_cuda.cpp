#include <tuple>

#include "cuda_support.h"
#include "edm2/mp_silu.h"

namespace edm2::torch_ops {
namespace {

/// c [batch, channels] of x's dtype and device.
View modulation(const Tensor& c_, const View& x, const Activation& shape, const char* op) {
  const View c = dense(c_, Format::kContiguous);
  EDM2_CHECK(c.dim == 2 && c.sizes[0] == shape.batch && c.sizes[1] == shape.channels, op, "c", "expected shape [",
             shape.batch, ", ", shape.channels, "], got ", c.shape());
  check_same_dtype(x, c, op, "c");
  check_same_gpu(x, c, op, "c");
  return c;
}

Tensor mp_silu(const Tensor& x_) {
  const char* op = "mp_silu";
  const View x = dense(x_);
  MPSiLUParams params{x.data(), nullptr, x.numel, cuda_dtype_of(x, op, "x")};
  const Tensor y = empty_like(x);
  params.y = address(y);
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_mp_silu(params, stream); });
  return y;
}

Tensor mp_silu_backward(const Tensor& grad, const Tensor& x_) {
  const char* op = "mp_silu_backward";
  const View x = dense(x_);
  const View grad_y = gradient_on_gpu(grad, x, op, "grad");
  MPSiLUBackwardParams params{grad_y.data(), x.data(), nullptr, x.numel, cuda_dtype_of(x, op, "x")};
  const Tensor grad_x = empty_like(x);
  params.grad_x = address(grad_x);
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_mp_silu_backward(params, stream); });
  return grad_x;
}

Tensor mp_silu_modulated(const Tensor& x_, const Tensor& c_) {
  const char* op = "mp_silu_modulated";
  const View x = dense(x_);
  const Activation shape = activation_of(x, op, "x");
  const View c = modulation(c_, x, shape, op);
  MPSiLUModulatedParams params{x.data(), c.data(), nullptr, shape, cuda_dtype_of(x, op, "x")};
  const Tensor y = empty_like(x);
  params.y = address(y);
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_mp_silu_modulated(params, stream); });
  return y;
}

std::tuple<Tensor, Tensor> mp_silu_modulated_backward(const Tensor& grad, const Tensor& x_, const Tensor& c_) {
  const char* op = "mp_silu_modulated_backward";
  const View x = dense(x_);
  const Activation shape = activation_of(x, op, "x");
  const View c = modulation(c_, x, shape, op);
  const View grad_y = gradient_on_gpu(grad, x, op, "grad");
  const DType dtype = cuda_dtype_of(x, op, "x");
  const int64_t floats = cuda::mp_silu_modulated_backward_workspace(shape);
  const Tensor grad_x = empty_like(x);
  const Tensor grad_c = empty_like(c);
  const Tensor partial = workspace(x, floats);
  const MPSiLUModulatedBackwardParams params{grad_y.data(),   x.data(), c.data(), address(grad_x),
                                             address(grad_c), shape,    dtype};
  run_cuda(x, op, [&](CUstream_st* stream) {
    return cuda::launch_mp_silu_modulated_backward(params, static_cast<float*>(address(partial)), stream);
  });
  return {grad_x, grad_c};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("mp_silu", TORCH_BOX(&mp_silu));
  m.impl("mp_silu_backward", TORCH_BOX(&mp_silu_backward));
  m.impl("mp_silu_modulated", TORCH_BOX(&mp_silu_modulated));
  m.impl("mp_silu_modulated_backward", TORCH_BOX(&mp_silu_modulated_backward));
}

}  // namespace edm2::torch_ops
