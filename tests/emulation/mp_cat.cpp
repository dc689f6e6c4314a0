// The MP-Cat launchers and kernels, for ctypes.
#include "cuda/mp_cat.cu"

using edm2::DType;

extern "C" int mp_cat(const void* a, const void* b, void* out, void* out_silu, int64_t rows, int64_t size_a,
                      int64_t size_b, int dtype, double weight_a, double weight_b) {
  return edm2::cuda::launch_mp_cat(
      {a, b, out, out_silu, rows, size_a, size_b, static_cast<DType>(dtype), weight_a, weight_b}, nullptr);
}

extern "C" int mp_cat_backward(const void* grad_out, const void* grad_silu, const void* out, void* grad_a, void* grad_b,
                               int64_t rows, int64_t size_a, int64_t size_b, int dtype, double weight_a,
                               double weight_b, const void* a, const void* b) {
  return edm2::cuda::launch_mp_cat_backward({grad_out, grad_silu, out, grad_a, grad_b, rows, size_a, size_b,
                                             static_cast<DType>(dtype), weight_a, weight_b, a, b},
                                            nullptr);
}
