// The launcher and kernels of the training loss, for ctypes.
#include "cuda/denoising_loss.cu"

using edm2::DType;

extern "C" int64_t denoising_loss_workspace(int64_t batch, int64_t channels, int64_t pixels) {
  return edm2::cuda::denoising_loss_workspace({batch, channels, pixels, false});
}

extern "C" int denoising_loss(const void* f, const void* x, const void* y, const void* sigma, const void* u, void* loss,
                              void* grad_f, void* grad_u, float* workspace, int64_t batch, int64_t channels,
                              int64_t pixels, bool channels_last, bool f_channels_last, double sigma_data, double scale,
                              int dtype) {
  return edm2::cuda::launch_denoising_loss({f,
                                            x,
                                            y,
                                            sigma,
                                            u,
                                            loss,
                                            grad_f,
                                            grad_u,
                                            {batch, channels, pixels, channels_last},
                                            f_channels_last,
                                            sigma_data,
                                            scale,
                                            static_cast<DType>(dtype)},
                                           workspace, nullptr);
}
