// The MP-SiLU launchers and kernels, for ctypes, and the random bits of dropout.
#include "cuda/mp_silu.cu"

using edm2::DType;

extern "C" int mp_silu(const void* x, void* y, int64_t numel, int dtype) {
  return edm2::cuda::launch_mp_silu({x, y, numel, static_cast<DType>(dtype)}, nullptr);
}

extern "C" int mp_silu_backward(const void* grad_y, const void* x, void* grad_x, int64_t numel, int dtype) {
  return edm2::cuda::launch_mp_silu_backward({grad_y, x, grad_x, numel, static_cast<DType>(dtype)}, nullptr);
}

extern "C" void dropout_bits(uint32_t* words, int64_t block, int64_t subsequence, int64_t seed, int64_t offset) {
  const auto bits = edm2::math::dropout_bits(block, subsequence, seed, offset);
  std::copy(std::begin(bits.words), std::end(bits.words), words);
}

extern "C" int mp_silu_modulated(const void* x, const void* c, void* y, int64_t batch, int64_t channels, int64_t pixels,
                                 bool channels_last, int dtype, const int64_t* philox, int64_t subsequence,
                                 int64_t threshold) {
  return edm2::cuda::launch_mp_silu_modulated(
      {x, c, y, {batch, channels, pixels, channels_last}, static_cast<DType>(dtype), {philox, subsequence, threshold}},
      nullptr);
}

extern "C" int64_t mp_silu_modulated_backward_workspace(int64_t batch, int64_t channels, int64_t pixels,
                                                        bool channels_last) {
  return edm2::cuda::mp_silu_modulated_backward_workspace({batch, channels, pixels, channels_last});
}

extern "C" int mp_silu_modulated_backward(const void* grad_y, const void* x, const void* c, void* grad_x, void* grad_c,
                                          float* workspace, int64_t batch, int64_t channels, int64_t pixels,
                                          bool channels_last, int dtype, const int64_t* philox, int64_t subsequence,
                                          int64_t threshold) {
  return edm2::cuda::launch_mp_silu_modulated_backward({grad_y,
                                                        x,
                                                        c,
                                                        grad_x,
                                                        grad_c,
                                                        {batch, channels, pixels, channels_last},
                                                        static_cast<DType>(dtype),
                                                        {philox, subsequence, threshold}},
                                                       workspace, nullptr);
}
