#include "cuda_support.h"
#include "mp_cat.h"

namespace edm2::torch_ops {
namespace {

/// b, on a's GPU and in its format.
View part_beside(const View& a, const Tensor& b, const char* op) {
  check_same_gpu(a, View(b), op, "b");
  return dense(b, a.format);
}

/// Fills what is not null of out and out_silu.
void cat(const Tensor& a_, const Tensor& b_, double t, Tensor* out, Tensor* out_silu, const char* op) {
  const View a = dense(a_);
  const View b = part_beside(a, b_, op);
  const MPCatParams params = cat_params(a, b, t, cuda_dtype_of(a, op, "a"), out, out_silu, op);
  run_cuda(a, op, [&](CUstream_st* stream) { return cuda::launch_mp_cat(params, stream); });
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

Tensor mp_cat(const Tensor& a, const Tensor& b, double t) {
  Tensor out;
  cat(a, b, t, &out, nullptr, "mp_cat");
  return out;
}

std::tuple<Tensor, Tensor> mp_cat_backward(const Tensor& grad, int64_t channels_a, double t) {
  return cat_backward(dense(grad), nullptr, nullptr, channels_a, t, "mp_cat_backward");
}

std::tuple<Tensor, Tensor> mp_cat_silu(const Tensor& a, const Tensor& b, double t) {
  Tensor out;
  Tensor out_silu;
  cat(a, b, t, &out, &out_silu, "mp_cat_silu");
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

/// MP-SiLU of the concatenation, which is not stored.
Tensor mp_cat_silu_only(const Tensor& a, const Tensor& b, double t) {
  Tensor out_silu;
  cat(a, b, t, nullptr, &out_silu, "mp_cat_silu_only");
  return out_silu;
}

/// The gradients of a and b from those of the concatenation and of MP-SiLU of it.
std::tuple<Tensor, Tensor> mp_cat_silu_only_backward(const Tensor& grad_, const Tensor& grad_silu_, const Tensor& a_,
                                                     const Tensor& b_, double t) {
  const char* op = "mp_cat_silu_only_backward";
  const View a = dense(a_);
  const View b = part_beside(a, b_, op);
  const DType dtype = cuda_dtype_of(a, op, "a");
  EDM2_CHECK(a.dim >= 2 && b.dim >= 2, op, "a, b", "expected shapes [batch, channels, ...], got ", a.shape(), " and ",
             b.shape());
  check_images_of(a, b, b.sizes[1], op, "b");
  check_same_dtype(a, b, op, "b");
  const auto gradient_of_both = [&](const Tensor& grad, const char* argument) {
    check_same_gpu(a, View(grad), op, argument);
    const View view = dense(grad, a.format);
    check_images_of(a, view, a.sizes[1] + b.sizes[1], op, argument);
    check_same_dtype(a, view, op, argument);
    return view;
  };
  const View grad = gradient_of_both(grad_, "grad");
  const View grad_silu = gradient_of_both(grad_silu_, "grad_silu");
  Tensor grad_a;
  Tensor grad_b;
  MPCatBackwardParams params =
      cat_backward_params(grad, &grad_silu, nullptr, a.sizes[1], t, dtype, &grad_a, &grad_b, op);
  params.a = a.data();
  params.b = b.data();
  run_cuda(a, op, [&](CUstream_st* stream) { return cuda::launch_mp_cat_backward(params, stream); });
  return {grad_a, grad_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("mp_cat", TORCH_BOX(&mp_cat));
  m.impl("mp_cat_backward", TORCH_BOX(&mp_cat_backward));
  m.impl("mp_cat_silu", TORCH_BOX(&mp_cat_silu));
  m.impl("mp_cat_silu_backward", TORCH_BOX(&mp_cat_silu_backward));
  m.impl("mp_cat_silu_only", TORCH_BOX(&mp_cat_silu_only));
  m.impl("mp_cat_silu_only_backward", TORCH_BOX(&mp_cat_silu_only_backward));
}

}  // namespace edm2::torch_ops
