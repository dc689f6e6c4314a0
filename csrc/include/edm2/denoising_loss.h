// The training loss (spec 4.1; Eqs. 14 to 16 and 21) of the U-Net's output F, and its gradients, in one pass:
// D = c_skip * x + c_out * F, l = (lambda / exp(u)) * (D - y)^2 + u, lambda = 1 / c_out^2.
#pragma once

#include "edm2/common.h"

namespace edm2 {

/// Images and numbers are fp32, or fp64 if F is.
struct DenoisingLossParams {
  const void* f;
  const void* x;      // noisy images
  const void* y;      // clean images, laid out like x
  const void* sigma;  // [batch]
  const void* u;      // [batch]
  void* loss;         // [batch]: sum of l over each sample
  void* grad_f;       // like F: gradient of scale * sum(l)
  void* grad_u;       // [batch]
  Activation shape;   // of x and y
  bool f_channels_last;
  double sigma_data;
  double scale;
  DType dtype;  // of F and its gradient
};

namespace cpu {
/// Work items are samples.
void denoising_loss(const DenoisingLossParams& params, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
/// Floats that the launch needs as workspace: a sum for each chunk of each sample.
int64_t denoising_loss_workspace(const Activation& shape);
/// Returns a cudaError_t.
int launch_denoising_loss(const DenoisingLossParams& params, float* workspace, CUstream_st* stream);
}  // namespace cuda

}  // namespace edm2
