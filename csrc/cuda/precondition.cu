#include "edm2/precondition.h"

#include "launch.h"
#include "precondition.cuh"

namespace edm2::cuda {
namespace {

int64_t sigma_bytes(const Activation& shape, bool per_sample) { return per_sample ? shape.batch * 4 : 4; }

template <typename T>
cudaError_t scale(const PreconditionScaleParams& params, cudaStream_t stream) {
  const auto& [batch, channels, pixels, channels_last] = params.shape;
  const Image image{channels, pixels, channels_last};
  const Image to{params.input ? channels + 1 : channels, pixels, params.out_channels_last};
  const int64_t numel = batch * to.numel();
  const Traffic traffic{batch * image.numel() * 4 + sigma_bytes(params.shape, params.sigma_per_sample),
                        numel * int64_t{sizeof(T)}};
  const auto start = [&](auto kernel, int width) {
    return launch(kernel, ceil_div(numel, width * kThreads), kThreads, stream, traffic,
                  static_cast<const float*>(params.image), static_cast<const float*>(params.sigma),
                  static_cast<T*>(params.out), image, to, batch, params.input, params.sigma_per_sample,
                  params.sigma_data);
  };
  if (to.numel() % kPack<T> == 0 && all_aligned(params.out))
    return start(precondition_scale_units<T, kPack<T>>, kPack<T>);
  return start(precondition_scale_units<T, 1>, 1);
}

template <typename T>
cudaError_t output(const PreconditionOutputParams& params, cudaStream_t stream) {
  const auto& [batch, channels, pixels, channels_last] = params.shape;
  const Image image{channels, pixels, channels_last};
  const Image raw{channels, pixels, params.f_channels_last};
  const int64_t numel = batch * image.numel();
  const Traffic traffic{numel * int64_t{4 + sizeof(T)} + sigma_bytes(params.shape, params.sigma_per_sample), numel * 4};
  const auto start = [&](auto kernel, int width) {
    return launch(kernel, ceil_div(numel, width * kThreads), kThreads, stream, traffic,
                  static_cast<const float*>(params.x), static_cast<const T*>(params.f),
                  static_cast<const float*>(params.sigma), static_cast<float*>(params.out), image, raw, batch,
                  params.sigma_per_sample, params.sigma_data);
  };
  constexpr int kWidth = kPack<float>;
  if (image.numel() % kWidth == 0 && all_aligned(params.x, params.out)) {
    return start(precondition_output_units<T, kWidth>, kWidth);
  }
  return start(precondition_output_units<T, 1>, 1);
}

}  // namespace

int launch_precondition_scale(const PreconditionScaleParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return scale<typename decltype(storage)::type>(params, stream); });
}

int launch_precondition_output(const PreconditionOutputParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return output<typename decltype(storage)::type>(params, stream); });
}

}  // namespace edm2::cuda
