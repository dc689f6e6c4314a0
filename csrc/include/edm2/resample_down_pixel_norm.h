// Halving an image with filter (1, 1), pixel norm of that, and MP-SiLU of the result: how an encoder block starts that
// lowers the resolution (spec 2.11, 2.10, 3.2).
#pragma once

#include "edm2/common.h"

namespace edm2 {

struct ResampleDownPixelNormParams {
  const void* x;  // [batch, channels, height, width]
  void* y;        // [batch, channels, height / 2, width / 2]: means over 2 x 2 pixels, normalised
  void* y_silu;
  void* rms;  // [batch, height / 2, width / 2], rms over channels of the means; fp32, or fp64 if x is
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  bool channels_last;
  DType dtype;
  double eps;
};

/// The gradient needs no more than the forward's results.
struct ResampleDownPixelNormBackwardParams {
  const void* grad_y;
  const void* grad_silu;
  const void* y;
  const void* rms;
  void* grad_x;
  int64_t batch;
  int64_t channels;
  int64_t height;  // of x
  int64_t width;
  bool channels_last;
  DType dtype;
  double eps;
};

namespace cpu {
/// Work items are rows of y, or, contiguous, as many rows as have about kHalvingBlock pixels; backward, channels_last:
/// pairs of rows of x.
constexpr int64_t kHalvingBlock = 64;
constexpr int64_t halving_rows(int64_t width) { return width / 2 < kHalvingBlock ? kHalvingBlock / (width / 2) : 1; }
template <class Params>
constexpr int64_t halving_items(const Params& params, bool backward) {
  const int64_t rows = params.height / 2;
  if (params.channels_last) return params.batch * (backward ? (params.height + 1) / 2 : rows);
  return params.batch * ((rows + halving_rows(params.width) - 1) / halving_rows(params.width));
}
void resample_down_pixel_norm(const ResampleDownPixelNormParams& params, int64_t begin, int64_t end);
void resample_down_pixel_norm_backward(const ResampleDownPixelNormBackwardParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Both return a cudaError_t.
int launch_resample_down_pixel_norm(const ResampleDownPixelNormParams& params, CUstream_st* stream);
int launch_resample_down_pixel_norm_backward(const ResampleDownPixelNormBackwardParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
