// Convolution with stride 1 and zero padding that keeps the size (spec 2.6 step 6), on tensor cores: implicit GEMM in
// NHWC, fp16 or bf16 in, sums in fp32. x is [batch, height, width, in], w [out, kernel_height, kernel_width, in] and y
// [batch, height, width, out] in memory.
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// in and out are multiples of kConvChannels; all pointers are of 16 bytes; kernel sizes are odd, and their product is
/// at most kConvMostTaps.
struct ConvShape {
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t in;
  int64_t out;
  int64_t kernel_height;
  int64_t kernel_width;

  constexpr int64_t pixels() const { return batch * height * width; }
  constexpr int64_t taps() const { return kernel_height * kernel_width; }
};

inline constexpr int64_t kConvChannels = 8;
inline constexpr int64_t kConvMostTaps = 25;
inline constexpr int64_t kConvMostPixels = int64_t{1} << 30;  // numbers of pixels fit 32 bits, beyond the last tile too
inline constexpr int64_t kConvMostColumns = int64_t{1} << 24;  // channels, and channels * taps

enum class ConvDirection : int32_t { kForward, kBackwardInput, kBackwardWeight };

/// How the matrix product that a convolution amounts to is shared out (mp_conv2d_plan.h).
struct ConvPlan {
  int tile;    // index into kConvTiles; from kConvTileCount on, a tile for Hopper
  int splits;  // parts of the sum, added in order by a second kernel if there are several
};

/// What becomes of a convolution's sums. y is always the convolution rounded to the dtype, and what follows is computed
/// from the rounded y: the result is that of separate kernels.
enum class ConvEpilogue : int32_t {
  kNone,           // y
  kGain,           // y = gain * convolution (Eq. 104)
  kModulatedSiLU,  // y, and out = mp_silu(y * c) (spec 2.8)
  kSum,            // y, and out = mp_sum(skip, y), clamped (Eq. 88, spec 2.13)
  kQKVNorm,        // y, and its q, k and v normalised over the channels of their heads (spec 2.12, steps 2-3)
};

/// Channels of q, k or v of a head for kQKVNorm. All three lie side by side in y, in one tile of the product.
inline constexpr int kConvHead = 64;

/// x of a 1x1 convolution as an MP-Cat (Eq. 103) whose halves were not joined: x = [weight_a a, weight_b b] along
/// channels. Both have multiples of kConvHalf channels, shape.in together; sums of one half are brought to the other's
/// weight on the way, so that neither weight may be far from the other: t is kConvLeastBalance to 1 -
/// kConvLeastBalance.
struct ConvHalves {
  const void* b = nullptr;  // like a, which is given as x; null: x is x
  int64_t in_a = 0;         // channels of a
  double weight_a = 1.0;
  double weight_b = 1.0;
};
inline constexpr int64_t kConvHalf = 32;
inline constexpr double kConvLeastBalance = 0.001;

struct MPConv2dParams {
  const void* x;
  const void* w;
  void* y;  // may be null where there is an `out`, or q, k and v
  ConvShape shape;
  DType dtype;
  ConvPlan plan;
  float* workspace;  // see conv_workspace
  ConvEpilogue epilogue = ConvEpilogue::kNone;
  void* out = nullptr;          // like y
  const float* gain = nullptr;  // one float on the GPU
  const void* c = nullptr;      // [batch, out]
  const void* skip = nullptr;   // like y
  double weight_skip = 0.0;     // (1 - t) / k
  double weight_y = 0.0;        // t / k
  double clip = 0.0;            // infinity: no clamping
  uint8_t* mask = nullptr;      // of the sum (edm2/mp_sum.h); null: not wanted
  void* qkv[3] = {};            // q, k and v, each [batch, height, width, out / (3 kConvHead), kConvHead]
  double eps = 0.0;             // of their normalisation
  ConvHalves halves = {};       // without epilogue
};

struct MPConv2dBackwardInputParams {
  const void* grad_y;
  const void* w;
  void* grad_x;
  ConvShape shape;
  DType dtype;
  ConvPlan plan;
  float* workspace;
};

struct MPConv2dBackwardWeightParams {
  const void* grad_y;
  const void* x;
  float* grad_w;
  ConvShape shape;
  DType dtype;  // of grad_y and x
  ConvPlan plan;
  float* workspace;
  ConvHalves halves = {};
};

namespace cuda {
/// The plan for the current GPU, or for meta tensors that of an H100. Returns a cudaError_t.
int plan_mp_conv2d(ConvDirection direction, const ConvShape& shape, bool meta, ConvPlan* plan);
/// Tiles there are kernels for: those for Hopper are left out of some builds.
int conv_tile_count();
/// Launches return a cudaError_t. Results do not depend on the order in which blocks run.
int launch_mp_conv2d(const MPConv2dParams& params, CUstream_st* stream);
int launch_mp_conv2d_backward_input(const MPConv2dBackwardInputParams& params, CUstream_st* stream);
int launch_mp_conv2d_backward_weight(const MPConv2dBackwardWeightParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
