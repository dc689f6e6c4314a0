// MP-SiLU, f(z) = z * sigmoid(z) / 0.596, and modulated MP-SiLU, f(x * c) with c per sample and channel, optionally
// followed by dropout.
#pragma once

#include "edm2/common.h"
#include "edm2/philox.h"

namespace edm2 {

struct MPSiLUParams {
  const void* x;
  void* y;
  int64_t numel;
  DType dtype;
};

struct MPSiLUBackwardParams {
  const void* grad_y;
  const void* x;
  void* grad_x;
  int64_t numel;
  DType dtype;
};

struct MPSiLUModulatedParams {
  const void* x;
  const void* c;  // [batch, channels]
  void* y;
  Activation shape;
  DType dtype;
  Dropout dropout = {};
};

struct MPSiLUModulatedBackwardParams {
  const void* grad_y;
  const void* x;
  const void* c;
  void* grad_x;
  void* grad_c;  // [batch, channels]: sum over pixels
  Activation shape;
  DType dtype;
  Dropout dropout = {};
};

namespace cpu {
/// Work items are elements.
void mp_silu(const MPSiLUParams& params, int64_t begin, int64_t end);
void mp_silu_backward(const MPSiLUBackwardParams& params, int64_t begin, int64_t end);
/// Work items are planes (batch * channels), or, channels_last, pixels (batch * pixels).
void mp_silu_modulated(const MPSiLUModulatedParams& params, int64_t begin, int64_t end);
/// Work items are (sample, block of channels) pairs, so that the sum over pixels stays within one item.
constexpr int64_t kModulatedChannelBlock = 64;
constexpr int64_t mp_silu_modulated_backward_items(const Activation& shape) {
  return shape.batch * ((shape.channels + kModulatedChannelBlock - 1) / kModulatedChannelBlock);
}
void mp_silu_modulated_backward(const MPSiLUModulatedBackwardParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Launches return a cudaError_t.
int launch_mp_silu(const MPSiLUParams& params, CUstream_st* stream);
int launch_mp_silu_backward(const MPSiLUBackwardParams& params, CUstream_st* stream);
int launch_mp_silu_modulated(const MPSiLUModulatedParams& params, CUstream_st* stream);
/// Floats of workspace that launch_mp_silu_modulated_backward wants (0: none).
int64_t mp_silu_modulated_backward_workspace(const Activation& shape);
int launch_mp_silu_modulated_backward(const MPSiLUModulatedBackwardParams& params, float* workspace,
                                      CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
