// The launchers and kernels that precede the products of cosine attention, for ctypes.
#include "cuda/cosine_attention.cu"

extern "C" int qkv_norm(const void* qkv, void* q, void* k, void* v, int64_t batch, int64_t channels, int64_t pixels,
                        bool channels_last, int64_t heads, int64_t head_dim, int dtype, double eps) {
  return edm2::cuda::launch_qkv_norm(
      {qkv, q, k, v, {batch, channels, pixels, channels_last}, heads, head_dim, static_cast<edm2::DType>(dtype), eps},
      nullptr);
}

extern "C" int qkv_norm_backward(const void* grad_q, const void* grad_k, const void* grad_v, const void* qkv,
                                 void* grad_qkv, int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
                                 int64_t heads, int64_t head_dim, int dtype, double eps) {
  return edm2::cuda::launch_qkv_norm_backward({grad_q,
                                               grad_k,
                                               grad_v,
                                               qkv,
                                               grad_qkv,
                                               {batch, channels, pixels, channels_last},
                                               heads,
                                               head_dim,
                                               static_cast<edm2::DType>(dtype),
                                               eps},
                                              nullptr);
}
