// The MP-Fourier launchers and kernels, for ctypes.
#include "cuda/mp_fourier.cu"

using edm2::DType;

extern "C" int mp_fourier(const void* x, const void* freqs, const void* phases, void* y, int64_t batch,
                          int64_t channels, int dtype) {
  return edm2::cuda::launch_mp_fourier({x, freqs, phases, y, batch, channels, static_cast<DType>(dtype)}, nullptr);
}

extern "C" int mp_fourier_backward(const void* grad_y, const void* x, const void* freqs, const void* phases,
                                   void* grad_x, void* grad_freqs, void* grad_phases, int64_t batch, int64_t channels,
                                   int dtype) {
  return edm2::cuda::launch_mp_fourier_backward(
      {grad_y, x, freqs, phases, grad_x, grad_freqs, grad_phases, batch, channels, static_cast<DType>(dtype)}, nullptr);
}
