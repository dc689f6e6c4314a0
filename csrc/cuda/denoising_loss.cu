#include "edm2/denoising_loss.h"

#include "denoising_loss.cuh"
#include "launch.h"

namespace edm2::cuda {
namespace {

int64_t count_chunks(const Activation& shape) { return ceil_div(shape.channels * shape.pixels, kLossChunk); }

template <typename T>
cudaError_t loss(const DenoisingLossParams& params, float* squares, cudaStream_t stream) {
  const auto& [batch, channels, pixels, channels_last] = params.shape;
  const Image image{channels, pixels, channels_last};
  const Image raw{channels, pixels, params.f_channels_last};
  const int64_t chunks = count_chunks(params.shape);
  const auto* sigma = static_cast<const float*>(params.sigma);
  const auto* u = static_cast<const float*>(params.u);
  const auto scale = static_cast<float>(params.scale);
  const int64_t read_bytes = batch * (raw.numel() * int64_t{sizeof(T) + 8} + 8);
  const int64_t written_bytes = batch * (raw.numel() * int64_t{sizeof(T)} + chunks * 4);
  const auto start = [&](auto kernel) {
    return launch(kernel, ceil_div(batch * chunks * kWarpSize, kThreads), kThreads, stream,
                  Traffic{read_bytes, written_bytes}, static_cast<const T*>(params.f),
                  static_cast<const float*>(params.x), static_cast<const float*>(params.y), sigma, u,
                  static_cast<T*>(params.grad_f), squares, image, raw, batch, chunks, params.sigma_data, scale);
  };
  const bool packs = raw.numel() % kPack<T> == 0 && all_aligned(params.f, params.grad_f);
  const cudaError_t error = packs ? start(denoising_loss_chunks<T, kPack<T>>) : start(denoising_loss_chunks<T, 1>);
  if (error != cudaSuccess) return error;
  return launch(denoising_loss_samples, ceil_div(batch * kWarpSize, kThreads), kThreads, stream,
                Traffic{batch * (chunks * 4 + 8), batch * 8}, static_cast<const float*>(squares), sigma, u,
                static_cast<float*>(params.loss), static_cast<float*>(params.grad_u), batch, chunks, raw.numel(),
                params.sigma_data, scale);
}

}  // namespace

int64_t denoising_loss_workspace(const Activation& shape) { return shape.batch * count_chunks(shape); }

int launch_denoising_loss(const DenoisingLossParams& params, float* workspace, CUstream_st* stream) {
  return dispatch_storage(
      params.dtype, [&](auto storage) { return loss<typename decltype(storage)::type>(params, workspace, stream); });
}

}  // namespace edm2::cuda
