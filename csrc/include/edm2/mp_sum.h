// MP-Sum (Eq. 88), (a + t * (b - a)) / sqrt((1 - t)^2 + t^2), optionally clamped to [-clip, clip].
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// Elements, in the order of memory, that share a byte of the mask, the first in its lowest bit. A bit is set where the
/// sum lies within the bounds, these included, so that the gradient passes (spec 2.13).
inline constexpr int64_t kMaskedTogether = 8;

struct MPSumParams {
  const void* a;
  const void* b;
  void* y;
  uint8_t* mask;  // null: not wanted
  int64_t numel;
  DType dtype;
  double weight_a;  // (1 - t) / k
  double weight_b;  // t / k
  double clip;      // infinity: no clamping
};

struct MPSumBackwardParams {
  const void* grad_y;
  const void* more_grad_y;  // to be added to it, from another user of y; null: there is none
  const uint8_t* mask;      // null: the gradient passes everywhere
  void* grad_a;
  void* grad_b;
  int64_t numel;
  DType dtype;
  double weight_a;
  double weight_b;
};

namespace cpu {
/// Work items are groups of kMaskedTogether elements, the last of which may be smaller.
void mp_sum(const MPSumParams& params, int64_t begin, int64_t end);
void mp_sum_backward(const MPSumBackwardParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Launches return a cudaError_t.
int launch_mp_sum(const MPSumParams& params, CUstream_st* stream);
int launch_mp_sum_backward(const MPSumBackwardParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
