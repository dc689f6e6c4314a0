// The launcher and kernels of the sampler's step, for ctypes.
#include "cuda/sampler_step.cu"

using edm2::DType;

extern "C" int sampler_step(const void* x, const void* denoised, const void* guide, const void* start,
                            const void* noise, const void* t_hat, const void* t_next, void* out, void* input,
                            int64_t batch, int64_t channels, int64_t pixels, bool channels_last,
                            bool input_channels_last, double guidance, double churn, double noise_scale,
                            double sigma_data, int dtype) {
  return edm2::cuda::launch_sampler_step({x,
                                          denoised,
                                          guide,
                                          start,
                                          noise,
                                          t_hat,
                                          t_next,
                                          out,
                                          input,
                                          {batch, channels, pixels, channels_last},
                                          input_channels_last,
                                          guidance,
                                          churn,
                                          noise_scale,
                                          sigma_data,
                                          static_cast<DType>(dtype)},
                                         nullptr);
}
