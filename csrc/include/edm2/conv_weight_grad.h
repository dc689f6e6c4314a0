// The gradient of a convolution's weight, NHWC, stride 1, zero padding r = kernel_size / 2 ("same"):
// y[o, i, t, s] = sum over n, h, w of grad[n, h, w, o] * x[n, h + t - r, w + s - r, i].
#pragma once

#include "edm2/common.h"

namespace edm2 {

struct ConvWeightGradParams {
  const float* grad;  // [batch, height, width, out_channels]
  const float* x;     // [batch, height, width, in_channels]
  float* y;           // [out_channels, in_channels, kernel_size, kernel_size]
  float* partial;     // [items, kConvTileOut * kConvTileIn], scratch
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t out_channels;
  int64_t in_channels;  // a multiple of kConvLanes
  int64_t kernel_size;  // odd
};

/// In channels of a vector register, and the largest tile of y that is summed in registers, for one position in the
/// kernel: twelve registers, enough to hide the latency of a multiply-add.
constexpr int kConvLanes = 8;
constexpr int kConvTileOut = 6;
constexpr int kConvTileIn = 2 * kConvLanes;

/// Tiles that n channels are cut into, of at most `most` each.
constexpr int64_t conv_tiles(int64_t n, int64_t most) { return (n + most - 1) / most; }

namespace cpu {
/// Work items are tiles of y: positions in the kernel, innermost, times conv_tiles of its in and out channels. Each is
/// summed in one order, whoever does it.
void conv_weight_grad(const ConvWeightGradParams& params, int64_t begin, int64_t end);
}  // namespace cpu

}  // namespace edm2
