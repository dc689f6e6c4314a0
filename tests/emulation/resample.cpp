// The resampling launchers and kernels, for ctypes.
#include "cuda/resample.cu"

extern "C" int resample(const void* x, void* y, int64_t batch, int64_t channels, int64_t height, int64_t width,
                        int64_t out_height, int64_t out_width, bool channels_last, int dtype, const double* filter,
                        int64_t taps, bool up) {
  const edm2::ResampleParams params{x,      y,          batch,     channels,      height,
                                    width,  out_height, out_width, channels_last, static_cast<edm2::DType>(dtype),
                                    filter, taps};
  return up ? edm2::cuda::launch_resample_up(params, nullptr) : edm2::cuda::launch_resample_down(params, nullptr);
}
