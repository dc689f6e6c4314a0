#include "edm2/mp_fourier.h"

#include "launch.h"
#include "mp_fourier.cuh"

namespace edm2::cuda {
namespace {

template <typename T>
cudaError_t forward(const MPFourierParams& params, cudaStream_t stream) {
  const int64_t numel = params.batch * params.channels;
  const Traffic traffic{params.batch * int64_t{sizeof(T)} + 8 * params.channels, numel * int64_t{sizeof(T)}};
  return launch(mp_fourier_elements<T>, ceil_div(numel, kThreads), kThreads, stream, traffic,
                static_cast<const T*>(params.x), static_cast<const float*>(params.freqs),
                static_cast<const float*>(params.phases), static_cast<T*>(params.y), params.batch, params.channels);
}

template <typename T>
cudaError_t backward(const MPFourierBackwardParams& params, cudaStream_t stream) {
  const auto* grad_y = static_cast<const T*>(params.grad_y);
  const auto* x = static_cast<const T*>(params.x);
  const auto* freqs = static_cast<const float*>(params.freqs);
  const auto* phases = static_cast<const float*>(params.phases);
  const auto& batch = params.batch;
  const auto& channels = params.channels;
  const int64_t bytes = (batch * channels + batch) * int64_t{sizeof(T)} + 8 * channels;
  const Traffic x_traffic{bytes, batch * int64_t{sizeof(T)}};
  const Traffic buffers_traffic{bytes, 8 * channels};
  const cudaError_t error = launch(mp_fourier_backward_x<T>, ceil_div(batch, kFourierRows), kThreads, stream, x_traffic,
                                   grad_y, x, freqs, phases, static_cast<T*>(params.grad_x), batch, channels);
  if (error != cudaSuccess) return error;
  return launch(mp_fourier_backward_buffers<T>, ceil_div(channels, kWarpSize), dim3(kWarpSize, kFourierRows), stream,
                buffers_traffic, grad_y, x, freqs, phases, static_cast<float*>(params.grad_freqs),
                static_cast<float*>(params.grad_phases), batch, channels);
}

}  // namespace

int launch_mp_fourier(const MPFourierParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return forward<typename decltype(storage)::type>(params, stream); });
}

int launch_mp_fourier_backward(const MPFourierBackwardParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return backward<typename decltype(storage)::type>(params, stream); });
}

}  // namespace edm2::cuda
