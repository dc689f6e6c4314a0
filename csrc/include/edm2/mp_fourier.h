// MP-Fourier (Eq. 75), y[n, i] = sqrt(2) * cos(x[n] * freqs[i] + phases[i]).
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// x and y are of type dtype; freqs and phases of the type computed in (fp64 for fp64, else fp32).
struct MPFourierParams {
  const void* x;       // [batch]
  const void* freqs;   // [channels]
  const void* phases;  // [channels]
  void* y;             // [batch, channels]
  int64_t batch;
  int64_t channels;
  DType dtype;
};

struct MPFourierBackwardParams {
  const void* grad_y;
  const void* x;
  const void* freqs;
  const void* phases;
  void* grad_x;       // [batch], dtype
  void* grad_freqs;   // [channels], of the type computed in
  void* grad_phases;  // [channels], of the type computed in
  int64_t batch;
  int64_t channels;
  DType dtype;
};

namespace cpu {
/// Work items are rows (samples).
void mp_fourier(const MPFourierParams& params, int64_t begin, int64_t end);
/// Work items are rows (samples); fills grad_x.
void mp_fourier_backward_x(const MPFourierBackwardParams& params, int64_t begin, int64_t end);
/// Work items are channels; fills grad_freqs and grad_phases.
void mp_fourier_backward_buffers(const MPFourierBackwardParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Launches return a cudaError_t.
int launch_mp_fourier(const MPFourierParams& params, CUstream_st* stream);
int launch_mp_fourier_backward(const MPFourierBackwardParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
