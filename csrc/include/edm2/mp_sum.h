// MP-Sum (Eq. 88), (a + t * (b - a)) / sqrt((1 - t)^2 + t^2), optionally clamped to [-clip, clip].
#pragma once

#include "edm2/common.h"

namespace edm2 {

struct MPSumParams {
  const void* a;
  const void* b;
  void* y;
  int64_t numel;
  DType dtype;
  double weight_a;  // (1 - t) / k
  double weight_b;  // t / k
  double clip;      // infinity: no clamping
};

struct MPSumBackwardParams {
  const void* grad_y;
  const void* a;  // a and b are read only if clip is finite
  const void* b;
  void* grad_a;
  void* grad_b;
  int64_t numel;
  DType dtype;
  double weight_a;
  double weight_b;
  double clip;
};

namespace cpu {
/// Work items are elements.
void mp_sum(const MPSumParams& params, int64_t begin, int64_t end);
void mp_sum_backward(const MPSumBackwardParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Launches return a cudaError_t.
int launch_mp_sum(const MPSumParams& params, CUstream_st* stream);
int launch_mp_sum_backward(const MPSumBackwardParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
