#include "edm2/mp_sum.h"

#include <cmath>

#include "launch.h"
#include "mp_sum.cuh"

namespace edm2::cuda {
namespace {

template <typename T>
cudaError_t forward(const MPSumParams& params, cudaStream_t stream) {
  const int64_t bytes = params.numel * int64_t{sizeof(T)};
  return launch(mp_sum_elements<T>, ceil_div(params.numel, kPack<T> * kThreads), kThreads, stream, {2 * bytes, bytes},
                static_cast<const T*>(params.a), static_cast<const T*>(params.b), static_cast<T*>(params.y),
                params.numel, static_cast<float>(params.weight_a), static_cast<float>(params.weight_b),
                static_cast<float>(params.clip));
}

template <typename T>
cudaError_t backward(const MPSumBackwardParams& params, cudaStream_t stream) {
  const auto* grad_y = static_cast<const T*>(params.grad_y);
  auto* grad_a = static_cast<T*>(params.grad_a);
  auto* grad_b = static_cast<T*>(params.grad_b);
  const auto weight_a = static_cast<float>(params.weight_a);
  const auto weight_b = static_cast<float>(params.weight_b);
  const int64_t bytes = params.numel * int64_t{sizeof(T)};
  const int64_t work = ceil_div(params.numel, kPack<T> * kThreads);
  if (std::isinf(params.clip)) {
    return launch(mp_sum_backward_elements<T>, work, kThreads, stream, {bytes, 2 * bytes}, grad_y, grad_a, grad_b,
                  params.numel, weight_a, weight_b);
  }
  return launch(mp_sum_clipped_backward_elements<T>, work, kThreads, stream, {3 * bytes, 2 * bytes}, grad_y,
                static_cast<const T*>(params.a), static_cast<const T*>(params.b), grad_a, grad_b, params.numel,
                weight_a, weight_b, static_cast<float>(params.clip));
}

}  // namespace

int launch_mp_sum(const MPSumParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return forward<typename decltype(storage)::type>(params, stream); });
}

int launch_mp_sum_backward(const MPSumBackwardParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return backward<typename decltype(storage)::type>(params, stream); });
}

}  // namespace edm2::cuda
