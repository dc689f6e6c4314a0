// The EMA launcher and kernel, for ctypes.
#include "cuda/ema_update.cu"

#include <vector>

/// `emas` is tensor-major: all profiles of the first tensor, then of the second.
extern "C" int ema_update(void* const* params, void* const* emas, const int64_t* numel, int64_t num_tensors,
                          const double* weights, int64_t profiles, int dtype) {
  std::vector<edm2::EMATensor> tensors;
  for (int64_t t = 0; t < num_tensors; ++t) tensors.push_back({params[t], emas + t * profiles, numel[t]});
  return edm2::cuda::launch_ema_update(
      {tensors.data(), weights, num_tensors, profiles, static_cast<edm2::DType>(dtype)}, nullptr);
}
