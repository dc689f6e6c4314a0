// The preconditioning launchers and kernels, for ctypes.
#include "cuda/precondition.cu"

using edm2::DType;

extern "C" int precondition_scale(const void* image, const void* sigma, void* out, int64_t batch, int64_t channels,
                                  int64_t pixels, bool channels_last, bool out_channels_last, bool input,
                                  bool sigma_per_sample, double sigma_data, int dtype) {
  return edm2::cuda::launch_precondition_scale({image,
                                                sigma,
                                                out,
                                                {batch, channels, pixels, channels_last},
                                                out_channels_last,
                                                input,
                                                sigma_per_sample,
                                                sigma_data,
                                                static_cast<DType>(dtype)},
                                               nullptr);
}

extern "C" int precondition_output(const void* x, const void* f, const void* sigma, void* out, int64_t batch,
                                   int64_t channels, int64_t pixels, bool channels_last, bool f_channels_last,
                                   bool sigma_per_sample, double sigma_data, int dtype) {
  return edm2::cuda::launch_precondition_output({x,
                                                 f,
                                                 sigma,
                                                 out,
                                                 {batch, channels, pixels, channels_last},
                                                 f_channels_last,
                                                 sigma_per_sample,
                                                 sigma_data,
                                                 static_cast<DType>(dtype)},
                                                nullptr);
}
