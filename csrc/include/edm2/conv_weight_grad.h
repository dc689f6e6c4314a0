// The gradient of a convolution's weight, NHWC, stride 1, zero padding r = kernel_size / 2 ("same"):
// y[o, i, t, s] = sum over n, h, w of grad[n, h, w, o] * x[n, h + t - r, w + s - r, i].
#pragma once

#include "edm2/common.h"

namespace edm2 {

struct ConvWeightGradParams {
  const void* grad;  // [batch, height, width, out_channels], floats or pairs
  const void* x;     // [batch, height, width, in_channels], alike
  bool pairs;        // what is multiplied: see ConvOperandParams
  float* y;          // [out_channels, in_channels, kernel_size, kernel_size]
  float* partial;    // [items, kConvTileOut * kConvTileIn], scratch
  int64_t batch;     // images, or pairs of them
  int64_t height;
  int64_t width;
  int64_t out_channels;
  int64_t in_channels;  // a multiple of kConvLanes
  int64_t kernel_size;  // odd
};

/// What bfloat16 images are multiplied as: floats; or, where instructions sum the products of two pairs, each element
/// of an even image (the low half of 32 bits) beside that of the odd image that follows it, or beside 0.
struct ConvOperandParams {
  const void* images;  // [batch, size]
  void* operand;       // floats [batch, size], or pairs [(batch + 1) / 2, size]
  int64_t batch;
  int64_t size;
  bool pairs;
};

/// In channels come in multiples of this; and the tile of y that is a work item, for one position in the kernel.
constexpr int kConvLanes = 8;
constexpr int kConvTileOut = 12;
constexpr int kConvTileIn = 32;

/// Tiles that n channels are cut into, of at most `most` each.
constexpr int64_t conv_tiles(int64_t n, int64_t most) { return (n + most - 1) / most; }

namespace cpu {
/// Work items are tiles of y: positions in the kernel, innermost, times conv_tiles of its in and out channels. Each is
/// summed in one order, whoever does it.
void conv_weight_grad(const ConvWeightGradParams& params, int64_t begin, int64_t end);
/// Work items are pairs of images.
void conv_operand(const ConvOperandParams& params, int64_t begin, int64_t end);
}  // namespace cpu

}  // namespace edm2
