#include "cuda_support.h"
#include "resample_down_pixel_norm.h"

namespace edm2::torch_ops {
namespace {

void halve_on_gpu(ResampleDownPixelNormParams& params, const View& x, const char* op) {
  params.dtype = cuda_dtype_of(x, op, "x");
  run_cuda(x, op, [&](CUstream_st* stream) { return cuda::launch_resample_down_pixel_norm(params, stream); });
}

void halve_backward_on_gpu(ResampleDownPixelNormBackwardParams& params, const View& y, const char* op) {
  params.dtype = cuda_dtype_of(y, op, "y");
  run_cuda(y, op, [&](CUstream_st* stream) { return cuda::launch_resample_down_pixel_norm_backward(params, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edm2, CUDA, m) {
  m.impl("resample_down_pixel_norm", TORCH_BOX(&resample_down_pixel_norm<halve_on_gpu>));
  m.impl("resample_down_pixel_norm_backward",
         TORCH_BOX((&resample_down_pixel_norm_backward<halve_backward_on_gpu, gradient_on_gpu>)));
}

}  // namespace edm2::torch_ops
