// The pixel-norm launchers and kernels, for ctypes.
#include "cuda/pixel_norm.cu"

extern "C" int pixel_norm(const void* x, void* y, void* y_silu, int64_t batch, int64_t channels, int64_t pixels,
                          bool channels_last, int dtype, double eps) {
  return edm2::cuda::launch_pixel_norm(
      {x, y, y_silu, {batch, channels, pixels, channels_last}, static_cast<edm2::DType>(dtype), eps}, nullptr);
}

extern "C" int pixel_norm_backward(const void* grad_y, const void* grad_silu, const void* x, void* grad_x,
                                   int64_t batch, int64_t channels, int64_t pixels, bool channels_last, int dtype,
                                   double eps) {
  return edm2::cuda::launch_pixel_norm_backward(
      {grad_y, grad_silu, x, grad_x, {batch, channels, pixels, channels_last}, static_cast<edm2::DType>(dtype), eps},
      nullptr);
}
