// What precedes the products of cosine attention (spec 2.12, steps 2-3): q, k and v taken apart, each normalised over
// the channels of its head. They and their gradients lie in memory as torch's attention likes them best: on the CPU
// [batch, heads, pixels, head_dim], on a GPU [batch, pixels, heads, head_dim], so that the heads of its output are
// already merged.
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// Channel (head * head_dim + i) * 3 + j of qkv is element i of q, k or v (j = 0, 1, 2).
struct QKVNormParams {
  const void* qkv;  // shape.channels = 3 * heads * head_dim
  void* q;
  void* k;
  void* v;
  Activation shape;
  int64_t heads;
  int64_t head_dim;
  DType dtype;
  double eps;
};

struct QKVNormBackwardParams {
  const void* grad_q;
  const void* grad_k;
  const void* grad_v;
  const void* qkv;
  void* grad_qkv;
  Activation shape;
  int64_t heads;
  int64_t head_dim;
  DType dtype;
  double eps;
};

namespace cpu {
/// Work items are (sample, head, block of pixels) triples.
constexpr int64_t kQKVPixelBlock = 32;
constexpr int64_t qkv_norm_items(const Activation& shape, int64_t heads) {
  return shape.batch * heads * ((shape.pixels + kQKVPixelBlock - 1) / kQKVPixelBlock);
}
void qkv_norm(const QKVNormParams& params, int64_t begin, int64_t end);
void qkv_norm_backward(const QKVNormBackwardParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Both return a cudaError_t.
int launch_qkv_norm(const QKVNormParams& params, CUstream_st* stream);
int launch_qkv_norm_backward(const QKVNormBackwardParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
