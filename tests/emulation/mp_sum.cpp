// The MP-Sum launchers and kernels, for ctypes.
#include "cuda/mp_sum.cu"

using edm2::DType;

extern "C" int mp_sum(const void* a, const void* b, void* y, uint8_t* mask, int64_t numel, int dtype, double weight_a,
                      double weight_b, double clip) {
  return edm2::cuda::launch_mp_sum({a, b, y, mask, numel, static_cast<DType>(dtype), weight_a, weight_b, clip},
                                   nullptr);
}

extern "C" int mp_sum_backward(const void* grad_y, const void* more_grad_y, const uint8_t* mask, void* grad_a,
                               void* grad_b, int64_t numel, int dtype, double weight_a, double weight_b) {
  return edm2::cuda::launch_mp_sum_backward(
      {grad_y, more_grad_y, mask, grad_a, grad_b, numel, static_cast<DType>(dtype), weight_a, weight_b}, nullptr);
}
