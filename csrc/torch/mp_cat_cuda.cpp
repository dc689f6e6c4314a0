#include "cuda_support.h"
#include "mp_cat.h"

namespace edm2::torch_ops {
namespace {

Tensor cat(const Tensor& a_, const Tensor& b_, double t, Tensor* out_silu, const char* op) {
  const View a = dense(a_);
  check_same_gpu(a, View(b_), op, "b");
  const View b = dense(b_, a.format);
  Tensor out;
  const MPCatParams params = cat_params(a, b, t, cuda_dtype_of(a, op, "a"), &out, out_silu, op);
  run_cuda(a, op, [&](CUstream_st* stream) { return cuda::launch_mp_cat(params, stream); });
  return out;
}

std::tuple<Tensor, Tensor> cat_backward(const View& grad, const View* grad_silu, const View* out, int64_t channels_a,
                                        double t, const char* op) {
  Tensor grad_a;
  Tensor grad_b;
  const DType dtype = cuda_dtype_of(grad, op, "grad");
  const MPCatBackwardParams params =
      cat_backward_params(grad, grad_silu, out, channels_a, t, dtype, &grad_a, &grad_b, op);
  run_cuda(grad, op, [&](CUstream_st* stream) { return cuda::launch_mp_cat_backward(params, stream); });
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
  const View grad_out = gradient_on_gpu(grad, out, op, "grad");
  const View grad_out_silu = gradient_on_gpu(grad_silu, out, op, "grad_silu");
  return cat_backward(grad_out, &grad_out_silu, &out, channels_a, t, op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("mp_cat", TORCH_BOX(&mp_cat));
  m.impl("mp_cat_backward", TORCH_BOX(&mp_cat_backward));
  m.impl("mp_cat_silu", TORCH_BOX(&mp_cat_silu));
  m.impl("mp_cat_silu_backward", TORCH_BOX(&mp_cat_silu_backward));
}

}  // namespace edm2::torch_ops
