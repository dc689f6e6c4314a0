// Separable 2x resampling of every channel with an even-length filter f of n taps, padding p = (n - 1) / 2 (spec 2.11):
// down: y[i] = sum_k f[k] * x[2 * i + k - p] per axis; up: its transpose. Gradients are the same two kernels with x and
// y exchanged.
#pragma once

#include "edm2/common.h"

namespace edm2 {

struct ResampleParams {
  const void* x;
  void* y;
  int64_t batch;
  int64_t channels;
  int64_t height;      // of x
  int64_t width;       // of x
  int64_t out_height;  // of y
  int64_t out_width;   // of y
  bool channels_last;
  DType dtype;
  const double* filter;  // [taps], scale per axis included
  int64_t taps;          // even
};

namespace cpu {
/// Work items are planes (batch * channels), or, channels_last, output rows (batch * out_height).
void resample_down(const ResampleParams& params, int64_t begin, int64_t end);
void resample_up(const ResampleParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// The most taps of a filter that launches take: it travels in their parameters.
constexpr int64_t kMostTaps = 128;
/// Both return a cudaError_t.
int launch_resample_down(const ResampleParams& params, CUstream_st* stream);
int launch_resample_up(const ResampleParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
