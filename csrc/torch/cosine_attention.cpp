#include "cosine_attention.h"

#include <tuple>

namespace edm2::torch_ops {
namespace {

std::tuple<Tensor, Tensor, Tensor> qkv_norm(const Tensor& qkv_, int64_t heads, double eps) {
  const char* op = "qkv_norm";
  const View qkv = dense(qkv_);
  QKVNormParams params{};
  params.shape = activation_of(qkv, op, "qkv");
  params.dtype = cpu_dtype_of(qkv, op, "qkv");
  params.heads = heads;
  params.head_dim = head_dim_of(params.shape, heads, op);
  params.eps = eps;
  const int64_t sizes[4] = {params.shape.batch, heads, params.shape.pixels, params.head_dim};
  const auto output = [&] { return empty(qkv, sizes, 4, Format::kContiguous, qkv.scalar_type); };
  const Tensor q = output(), k = output(), v = output();
  params.qkv = qkv.data();
  params.q = q.mutable_data_ptr();
  params.k = k.mutable_data_ptr();
  params.v = v.mutable_data_ptr();
  run_cpu(cpu::qkv_norm, params, cpu::qkv_norm_items(params.shape, heads), qkv.numel);
  return {q, k, v};
}

Tensor qkv_norm_backward(const Tensor& grad_q_, const Tensor& grad_k_, const Tensor& grad_v_, const Tensor& qkv_,
                         int64_t heads, double eps) {
  const char* op = "qkv_norm_backward";
  const View qkv = dense(qkv_);
  QKVNormBackwardParams params{};
  params.shape = activation_of(qkv, op, "qkv");
  params.dtype = cpu_dtype_of(qkv, op, "qkv");
  params.heads = heads;
  params.head_dim = head_dim_of(params.shape, heads, op);
  params.eps = eps;
  const auto part = [&](const Tensor& grad, const char* argument) {
    return dense(part_gradient(grad, qkv, params.shape, heads, op, argument), Format::kContiguous);
  };
  const View grad_q = part(grad_q_, "grad_q"), grad_k = part(grad_k_, "grad_k"), grad_v = part(grad_v_, "grad_v");
  const Tensor grad_qkv = empty_like(qkv);
  params.grad_q = grad_q.data();
  params.grad_k = grad_k.data();
  params.grad_v = grad_v.data();
  params.qkv = qkv.data();
  params.grad_qkv = grad_qkv.mutable_data_ptr();
  run_cpu(cpu::qkv_norm_backward, params, cpu::qkv_norm_items(params.shape, heads), qkv.numel);
  return grad_qkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CPU, m) {
  m.impl("qkv_norm", TORCH_BOX(&qkv_norm));
  m.impl("qkv_norm_backward", TORCH_BOX(&qkv_norm_backward));
}

}  // namespace edm2::torch_ops
