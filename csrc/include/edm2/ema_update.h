// Multi-tensor EMA update: every profile of every tensor in one pass, ema += weight * (param - ema), weight = 1 - beta
// (Eq. 127).
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// One parameter tensor and its averages. All dense, all of one layout and dtype (fp32 or fp64).
struct EMATensor {
  const void* param;
  void* const* emas;  // [profiles]
  int64_t numel;
};

struct EMAUpdateParams {
  const EMATensor* tensors;  // [num_tensors], host memory
  const double* weights;     // [profiles], host memory
  int64_t num_tensors;
  int64_t profiles;
  DType dtype;
};

namespace cpu {
/// Work items are elements of all tensors laid end to end.
void ema_update(const EMAUpdateParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Returns a cudaError_t. Descriptors travel as kernel parameters, in as many launches as their limit needs.
int launch_ema_update(const EMAUpdateParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
