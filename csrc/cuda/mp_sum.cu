#include "edm2/mp_sum.h"

#include "launch.h"
#include "mp_sum.cuh"

namespace edm2::cuda {
namespace {

int64_t mask_bytes(int64_t numel) { return ceil_div(numel, kMaskedTogether); }

template <typename T>
cudaError_t forward(const MPSumParams& params, cudaStream_t stream) {
  const auto* a = static_cast<const T*>(params.a);
  const auto* b = static_cast<const T*>(params.b);
  auto* y = static_cast<T*>(params.y);
  const auto weight_a = static_cast<float>(params.weight_a);
  const auto weight_b = static_cast<float>(params.weight_b);
  const auto clip = static_cast<float>(params.clip);
  const int64_t bytes = params.numel * int64_t{sizeof(T)};
  if (params.mask == nullptr) {
    return launch(mp_sum_elements<T>, ceil_div(params.numel, kPack<T> * kThreads), kThreads, stream, {2 * bytes, bytes},
                  a, b, y, params.numel, weight_a, weight_b, clip);
  }
  const int64_t groups = mask_bytes(params.numel);
  return launch(mp_sum_clipped_elements<T>, ceil_div(groups, kThreads), kThreads, stream, {2 * bytes, bytes + groups},
                a, b, y, params.mask, params.numel, all_aligned(a, b, y), weight_a, weight_b, clip);
}

template <typename T, bool kTwoUsers>
cudaError_t backward(const MPSumBackwardParams& params, cudaStream_t stream) {
  const auto* grad_y = static_cast<const T*>(params.grad_y);
  const auto* more_grad_y = static_cast<const T*>(params.more_grad_y);
  auto* grad_a = static_cast<T*>(params.grad_a);
  auto* grad_b = static_cast<T*>(params.grad_b);
  const auto weight_a = static_cast<float>(params.weight_a);
  const auto weight_b = static_cast<float>(params.weight_b);
  const int64_t bytes = params.numel * int64_t{sizeof(T)};
  const int64_t read = (kTwoUsers ? 2 : 1) * bytes;
  if (params.mask == nullptr) {
    return launch(mp_sum_backward_elements<T, kTwoUsers>, ceil_div(params.numel, kPack<T> * kThreads), kThreads, stream,
                  {read, 2 * bytes}, grad_y, more_grad_y, grad_a, grad_b, params.numel, weight_a, weight_b);
  }
  const int64_t groups = mask_bytes(params.numel);
  return launch(mp_sum_clipped_backward_elements<T, kTwoUsers>, ceil_div(groups, kThreads), kThreads, stream,
                {read + groups, 2 * bytes}, grad_y, more_grad_y, params.mask, grad_a, grad_b, params.numel,
                all_aligned(grad_y, more_grad_y, grad_a, grad_b), weight_a, weight_b);
}

}  // namespace

int launch_mp_sum(const MPSumParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return forward<typename decltype(storage)::type>(params, stream); });
}

int launch_mp_sum_backward(const MPSumBackwardParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    return params.more_grad_y == nullptr ? backward<T, false>(params, stream) : backward<T, true>(params, stream);
  });
}

}  // namespace edm2::cuda
