#include "edm2/cosine_attention.h"

#include "cosine_attention.cuh"
#include "launch.h"

namespace edm2::cuda {
namespace {

template <int N>
int64_t count_strips(const Activation& shape, int64_t heads) {
  return shape.batch * heads * 3 * ceil_div(shape.pixels, PixelStrip<N>::kPixels);
}

template <typename T>
cudaError_t forward(const QKVNormParams& params, cudaStream_t stream) {
  constexpr int N = kPack<T>;
  const auto* qkv = static_cast<const T*>(params.qkv);
  const Parts<T> out{static_cast<T*>(params.q), static_cast<T*>(params.k), static_cast<T*>(params.v)};
  const auto [batch, channels, pixels, channels_last] = params.shape;
  const int64_t heads = params.heads;
  const int64_t head_dim = params.head_dim;
  const auto eps = static_cast<float>(params.eps);
  const int64_t bytes = batch * channels * pixels * int64_t{sizeof(T)};
  const Traffic traffic{bytes, bytes};
  const bool packs = head_dim % N == 0 && all_aligned(qkv, out.part[0], out.part[1], out.part[2]);
  if (!channels_last) {
    if (packs && pixels % N == 0) {
      const int64_t strips = count_strips<N>(params.shape, heads);
      return launch(qkv_norm_planes<T, N>, strips, kThreads, stream, traffic, qkv, out, strips, heads, head_dim, pixels,
                    eps);
    }
    const int64_t strips = count_strips<1>(params.shape, heads);
    return launch(qkv_norm_planes<T, 1>, strips, kThreads, stream, traffic, qkv, out, strips, heads, head_dim, pixels,
                  eps);
  }
  const int64_t rows = batch * pixels * heads;
  if (packs && head_dim <= kWarpSize * N) {
    const int lanes = lanes_for(head_dim / N);
    return launch(qkv_norm_rows<T>, ceil_div(rows * lanes, kThreads), kThreads, stream, traffic, qkv, out, rows,
                  static_cast<int>(head_dim), lanes, eps);
  }
  return launch(qkv_norm_long_rows<T>, ceil_div(rows * kWarpSize, kThreads), kThreads, stream, traffic, qkv, out, rows,
                head_dim, eps);
}

template <typename T>
cudaError_t backward(const QKVNormBackwardParams& params, cudaStream_t stream) {
  constexpr int N = kPack<T>;
  const Parts<const T> grads{static_cast<const T*>(params.grad_q), static_cast<const T*>(params.grad_k),
                             static_cast<const T*>(params.grad_v)};
  const auto* qkv = static_cast<const T*>(params.qkv);
  auto* grad_qkv = static_cast<T*>(params.grad_qkv);
  const auto [batch, channels, pixels, channels_last] = params.shape;
  const int64_t heads = params.heads;
  const int64_t head_dim = params.head_dim;
  const auto eps = static_cast<float>(params.eps);
  const int64_t bytes = batch * channels * pixels * int64_t{sizeof(T)};
  const Traffic traffic{2 * bytes, bytes};
  const bool packs = head_dim % N == 0 && all_aligned(grads.part[0], grads.part[1], grads.part[2], qkv, grad_qkv);
  if (!channels_last) {
    if (packs && pixels % N == 0) {
      const int64_t strips = count_strips<N>(params.shape, heads);
      return launch(qkv_norm_backward_planes<T, N>, strips, kThreads, stream, traffic, grads, qkv, grad_qkv, strips,
                    heads, head_dim, pixels, eps);
    }
    const int64_t strips = count_strips<1>(params.shape, heads);
    return launch(qkv_norm_backward_planes<T, 1>, strips, kThreads, stream, traffic, grads, qkv, grad_qkv, strips,
                  heads, head_dim, pixels, eps);
  }
  const int64_t rows = batch * pixels * heads;
  if (packs && head_dim <= kWarpSize * N) {
    const int lanes = lanes_for(head_dim / N);
    return launch(qkv_norm_backward_rows<T>, ceil_div(rows * lanes, kThreads), kThreads, stream, traffic, grads, qkv,
                  grad_qkv, rows, static_cast<int>(head_dim), lanes, eps);
  }
  return launch(qkv_norm_backward_long_rows<T>, ceil_div(rows * kWarpSize, kThreads), kThreads, stream, traffic, grads,
                qkv, grad_qkv, rows, head_dim, eps);
}

}  // namespace

int launch_qkv_norm(const QKVNormParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return forward<typename decltype(storage)::type>(params, stream); });
}

int launch_qkv_norm_backward(const QKVNormBackwardParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return backward<typename decltype(storage)::type>(params, stream); });
}

}  // namespace edm2::cuda
