#include "edm2/sampler_step.h"

#include "launch.h"
#include "sampler_step.cuh"

namespace edm2::cuda {
namespace {

template <typename T>
cudaError_t step(const SamplerStepParams& params, cudaStream_t stream) {
  const auto& [batch, channels, pixels, channels_last] = params.shape;
  const Image image{channels, pixels, channels_last};
  const Image to{channels + 1, pixels, params.input_channels_last};
  const int64_t numel = batch * image.numel();
  const int inputs = 2 + (params.guide != nullptr) + (params.start != nullptr) + (params.noise != nullptr);
  const int64_t input_bytes = params.input != nullptr ? batch * to.numel() * int64_t{sizeof(T)} : 0;
  const Traffic traffic{inputs * numel * 4 + 8, numel * 4 + input_bytes};
  const SamplerTensors state{static_cast<const float*>(params.x),     static_cast<const float*>(params.denoised),
                             static_cast<const float*>(params.guide), static_cast<const float*>(params.start),
                             static_cast<const float*>(params.noise), static_cast<float*>(params.out)};
  const auto start = [&](auto kernel, int width) {
    return launch(kernel, ceil_div(numel, width * kThreads), kThreads, stream, traffic, state,
                  static_cast<const float*>(params.t_hat), static_cast<const float*>(params.t_next),
                  static_cast<T*>(params.input), image, to, batch, static_cast<float>(params.guidance),
                  static_cast<float>(params.churn), static_cast<float>(params.noise_scale), params.sigma_data);
  };
  constexpr int kWidth = kPack<float>;
  const bool packs = image.numel() % kWidth == 0 &&
                     all_aligned(params.x, params.denoised, params.guide, params.start, params.noise, params.out);
  return packs ? start(sampler_step_units<T, kWidth>, kWidth) : start(sampler_step_units<T, 1>, 1);
}

}  // namespace

int launch_sampler_step(const SamplerStepParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return step<typename decltype(storage)::type>(params, stream); });
}

}  // namespace edm2::cuda
