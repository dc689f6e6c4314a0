// The launchers and kernels of halving with pixel norm, for ctypes.
#include "cuda/resample_down_pixel_norm.cu"

extern "C" int resample_down_pixel_norm(const void* x, void* y, void* y_silu, void* rms, int64_t batch,
                                        int64_t channels, int64_t height, int64_t width, bool channels_last, int dtype,
                                        double eps) {
  const auto type = static_cast<edm2::DType>(dtype);
  return edm2::cuda::launch_resample_down_pixel_norm(
      {x, y, y_silu, rms, batch, channels, height, width, channels_last, type, eps}, nullptr);
}

extern "C" int resample_down_pixel_norm_backward(const void* grad_y, const void* grad_silu, const void* y,
                                                 const void* rms, void* grad_x, int64_t batch, int64_t channels,
                                                 int64_t height, int64_t width, bool channels_last, int dtype,
                                                 double eps) {
  const auto type = static_cast<edm2::DType>(dtype);
  return edm2::cuda::launch_resample_down_pixel_norm_backward(
      {grad_y, grad_silu, y, rms, grad_x, batch, channels, height, width, channels_last, type, eps}, nullptr);
}
