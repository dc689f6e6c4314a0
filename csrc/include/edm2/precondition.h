// Preconditioning (spec 3.4, Eqs. 4 to 8): what the U-Net sees, and the denoiser made of its output F. Images outside
// the U-Net are fp32 (fp64 if the U-Net is), its input and output of its own dtype and layout; the coefficients are
// made of sigma in the kernels.
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// c_in(sigma) * image and a last channel of ones (spec 2.14), or c_out(sigma) * image alone, in the U-Net's dtype and
/// layout.
struct PreconditionScaleParams {
  const void* image;  // fp32, or fp64 if dtype is
  const void* sigma;  // of the image's dtype: one, or one per sample
  void* out;
  Activation shape;  // of the image
  bool out_channels_last;
  bool input;  // c_in and ones; else c_out
  bool sigma_per_sample;
  double sigma_data;
  DType dtype;  // of out
};

/// D = c_skip(sigma) * x + c_out(sigma) * F, in x's dtype and layout.
struct PreconditionOutputParams {
  const void* x;  // fp32, or fp64 if dtype is
  const void* f;
  const void* sigma;
  void* out;
  Activation shape;  // of x
  bool f_channels_last;
  bool sigma_per_sample;
  double sigma_data;
  DType dtype;  // of f
};

namespace cpu {
/// Work items are pixels of all samples.
void precondition_scale(const PreconditionScaleParams& params, int64_t begin, int64_t end);
void precondition_output(const PreconditionOutputParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Launches return a cudaError_t.
int launch_precondition_scale(const PreconditionScaleParams& params, CUstream_st* stream);
int launch_precondition_output(const PreconditionOutputParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
