// One Euler or Heun step of the sampler (spec 6.1, 6.2): from the denoised images at x to the next x, the noise that
// the step after it begins with, and what the U-Net sees of the result.
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// All but `input` is fp32 (fp64 if `dtype` is) and laid out like x.
struct SamplerStepParams {
  const void* x;         // where the denoiser was evaluated: at t_hat, or, if start is given, at t_next
  const void* denoised;  // D(x)
  const void* guide;     // the guiding network's; null: none
  const void* start;     // null: Euler step from x; else x is that step's result from `start`, to be corrected (Heun)
  const void* noise;     // null: none is added
  const void* t_hat;     // one number each
  const void* t_next;
  void* out;
  void* input;  // [batch, channels + 1, pixels]: c_in * out and ones; null: not wanted
  Activation shape;
  bool input_channels_last;
  double guidance;
  double churn;        // gamma of the next step: it starts at t_next * (1 + churn)
  double noise_scale;  // of the noise that the next step begins with, in units of t_next
  double sigma_data;
  DType dtype;  // of input if that is wanted, else of x
};

namespace cpu {
/// Work items are pixels of all samples.
void sampler_step(const SamplerStepParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Returns a cudaError_t.
int launch_sampler_step(const SamplerStepParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
