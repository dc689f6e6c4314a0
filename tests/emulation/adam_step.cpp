// The optimizer step's launcher and kernels, for ctypes, and those of weight normalisation, which they use.
#include "cuda/adam_step.cu"
#include "cuda/normalize_weight.cu"

/// Pointers run parallel, `profiles` averages for each tensor; numbers: rows, row_size, inner, weight.
extern "C" int adam_step(void* const* pointers, void* const* emas, void* const* gain_emas, const int64_t* numbers,
                         int64_t count, const double* scalars, const float* loss_scale, int64_t profiles,
                         int prepared_dtype, double beta1, double beta2, double eps, double norm_eps, bool effective,
                         bool force) {
  std::vector<edm2::AdamTensor> tensors;
  for (int64_t i = 0; i < count; ++i, pointers += 10, numbers += 4) {
    tensors.push_back({pointers[0], pointers[1], pointers[2], pointers[3], emas + i * profiles,
                       static_cast<int64_t*>(pointers[4]), pointers[5], static_cast<edm2::DType>(prepared_dtype),
                       pointers[6], pointers[7], pointers[8], gain_emas + i * profiles, pointers[9], numbers[0],
                       numbers[1], numbers[2], numbers[3] != 0});
  }
  return edm2::cuda::launch_adam_step({tensors.data(), nullptr, count, profiles, scalars, loss_scale,
                                       edm2::DType::kFloat32, beta1, beta2, eps, norm_eps, effective, force},
                                      nullptr);
}
