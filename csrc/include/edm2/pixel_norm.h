// Pixel norm: y = x / (eps + rms over channels), optionally with MP-SiLU of the result.
#pragma once

#include "edm2/common.h"

namespace edm2 {

struct PixelNormParams {
  const void* x;
  void* y;
  void* y_silu;  // null: not wanted
  Activation shape;
  DType dtype;
  double eps;
};

struct PixelNormBackwardParams {
  const void* grad_y;
  const void* grad_silu;  // null: MP-SiLU was not emitted
  const void* x;
  void* grad_x;
  Activation shape;
  DType dtype;
  double eps;
};

namespace cpu {
/// Work items are pixels (batch * pixels of them); a call handles [begin, end).
void pixel_norm(const PixelNormParams& params, int64_t begin, int64_t end);
void pixel_norm_backward(const PixelNormBackwardParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Both return a cudaError_t.
int launch_pixel_norm(const PixelNormParams& params, CUstream_st* stream);
int launch_pixel_norm_backward(const PixelNormBackwardParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
