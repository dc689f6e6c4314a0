// The weight normalisation launchers and kernels, for ctypes. Arrays run parallel, one entry per tensor.
#include "cuda/normalize_weight.cu"

#include <vector>

using edm2::DType;

extern "C" int normalize_weight(void* const* w, void* const* out, float* const* gain, const int64_t* rows,
                                const int64_t* row_size, const int64_t* inner, const double* factor, int64_t count,
                                int dtype, int out_dtype, double eps, bool force) {
  std::vector<edm2::WeightRows> tensors;
  for (int64_t i = 0; i < count; ++i) {
    tensors.push_back(
        {w[i], out[i], rows[i], row_size[i], inner[i], gain[i], factor[i], static_cast<DType>(out_dtype)});
  }
  return edm2::cuda::launch_normalize_weight({tensors.data(), nullptr, count, static_cast<DType>(dtype), eps, force},
                                             nullptr);
}

extern "C" int normalize_weight_backward(void* const* grad, void* const* w, void* const* grad_w, void* const* row_dots,
                                         float* const* grad_gain, float* const* gain, const int64_t* rows,
                                         const int64_t* row_size, const double* factor, const double* gain_grad_factor,
                                         int64_t count, int dtype, int grad_dtype, double eps) {
  std::vector<edm2::WeightRowsBackward> tensors;
  for (int64_t i = 0; i < count; ++i) {
    tensors.push_back({grad[i], w[i], grad_w[i], row_dots[i], rows[i], row_size[i], gain[i], factor[i], grad_gain[i],
                       gain_grad_factor[i]});
  }
  return edm2::cuda::launch_normalize_weight_backward(
      {tensors.data(), nullptr, count, static_cast<DType>(dtype), static_cast<DType>(grad_dtype), eps}, nullptr);
}
