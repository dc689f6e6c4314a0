// MP-Cat (Eq. 103), concat(weight_a * a, weight_b * b) along channels, with MP-SiLU of the result or, on a GPU, that
// only.
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// A row is what lies together in memory: one sample's channels * pixels, or, channels_last, one pixel's channels.
struct MPCatParams {
  const void* a;   // [rows, size_a]
  const void* b;   // [rows, size_b]
  void* out;       // [rows, size_a + size_b]; null, on a GPU: not wanted
  void* out_silu;  // null: not wanted
  int64_t rows;
  int64_t size_a;
  int64_t size_b;
  DType dtype;
  double weight_a;
  double weight_b;
};

struct MPCatBackwardParams {
  const void* grad_out;
  const void* grad_silu;  // null: MP-SiLU was not emitted; then out is null as well
  const void* out;        // the concatenation, null if nobody stored it: then a and b are there
  void* grad_a;
  void* grad_b;
  int64_t rows;
  int64_t size_a;
  int64_t size_b;
  DType dtype;
  double weight_a;
  double weight_b;
  const void* a = nullptr;  // on a GPU
  const void* b = nullptr;
};

namespace cpu {
/// Work items are elements of the concatenation.
void mp_cat(const MPCatParams& params, int64_t begin, int64_t end);
void mp_cat_backward(const MPCatBackwardParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Launches return a cudaError_t.
int launch_mp_cat(const MPCatParams& params, CUstream_st* stream);
int launch_mp_cat_backward(const MPCatBackwardParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
