#include "edm2/mp_silu.h"

#include "launch.h"
#include "mp_silu.cuh"

namespace edm2::cuda {
namespace {

template <typename T>
cudaError_t forward(const MPSiLUParams& params, cudaStream_t stream) {
  const int64_t bytes = params.numel * int64_t{sizeof(T)};
  return launch(mp_silu_elements<T>, ceil_div(params.numel, kPack<T> * kThreads), kThreads, stream, {bytes, bytes},
                static_cast<const T*>(params.x), static_cast<T*>(params.y), params.numel);
}

template <typename T>
cudaError_t backward(const MPSiLUBackwardParams& params, cudaStream_t stream) {
  const int64_t bytes = params.numel * int64_t{sizeof(T)};
  return launch(mp_silu_backward_elements<T>, ceil_div(params.numel, kPack<T> * kThreads), kThreads, stream,
                {2 * bytes, bytes}, static_cast<const T*>(params.grad_y), static_cast<const T*>(params.x),
                static_cast<T*>(params.grad_x), params.numel);
}

/// Block shape and number of tiles for columns of `n` channels: at most a warp across, evenly.
struct TilePlan {
  dim3 threads;
  int64_t tiles;

  TilePlan(const Activation& shape, int n) {
    const int64_t columns = shape.channels / n;
    const auto across = static_cast<unsigned>(ceil_div(columns, ceil_div(columns, kWarpSize)));
    threads = dim3(across, kThreads / across);
    tiles = shape.batch * ceil_div(columns, across) * count_chunks<true>(shape.pixels);
  }
};

/// The number of chunks, and lanes for each.
struct PlanePlan {
  int64_t chunks;
  int lanes;

  PlanePlan(const Activation& shape, int n)
      : chunks(shape.batch * shape.channels * count_chunks<false>(shape.pixels)),
        lanes(lanes_for(ceil_div(std::min(shape.pixels, kChunkPixels<false>), n))) {}

  int64_t work() const { return ceil_div(chunks * lanes, kThreads); }
};

template <typename T, bool kDropout>
cudaError_t modulated(const MPSiLUModulatedParams& params, cudaStream_t stream) {
  const auto* x = static_cast<const T*>(params.x);
  const auto* c = static_cast<const T*>(params.c);
  auto* y = static_cast<T*>(params.y);
  const auto& [batch, channels, pixels, channels_last] = params.shape;
  if (batch * channels * pixels == 0) return cudaSuccess;
  const int64_t bytes = batch * channels * pixels * int64_t{sizeof(T)};
  const Traffic traffic{bytes + batch * channels * int64_t{sizeof(T)}, bytes};
  if (!channels_last) {
    const PlanePlan plan(params.shape, kPack<T>);
    return launch(mp_silu_modulated_planes<T, kDropout>, plan.work(), kThreads, stream, traffic, x, c, y,
                  params.dropout, plan.chunks, channels, pixels, plan.lanes);
  }
  if (channels % kPack<T> == 0 && all_aligned(x, c, y)) {
    const TilePlan plan(params.shape, kPack<T>);
    return launch(mp_silu_modulated_columns<T, kPack<T>, kDropout>, plan.tiles, plan.threads, stream, traffic, x, c, y,
                  params.dropout, plan.tiles, channels, pixels);
  }
  const TilePlan plan(params.shape, 1);
  return launch(mp_silu_modulated_columns<T, 1, kDropout>, plan.tiles, plan.threads, stream, traffic, x, c, y,
                params.dropout, plan.tiles, channels, pixels);
}

template <typename T, bool kDropout>
cudaError_t modulated_backward(const MPSiLUModulatedBackwardParams& params, float* workspace, cudaStream_t stream) {
  const auto* grad_y = static_cast<const T*>(params.grad_y);
  const auto* x = static_cast<const T*>(params.x);
  const auto* c = static_cast<const T*>(params.c);
  auto* grad_x = static_cast<T*>(params.grad_x);
  auto* grad_c = static_cast<T*>(params.grad_c);
  const auto& [batch, channels, pixels, channels_last] = params.shape;
  const int64_t count = batch * channels;
  if (count == 0) return cudaSuccess;
  const int64_t chunks = channels_last ? count_chunks<true>(pixels) : count_chunks<false>(pixels);
  const ChunkSums<T> sums{chunks > 1 ? workspace : nullptr, grad_c, count};
  const int64_t bytes = count * pixels * int64_t{sizeof(T)};
  const int64_t sums_bytes = chunks > 1 ? chunks * count * 4 : count * int64_t{sizeof(T)};
  const Traffic traffic{2 * bytes + count * int64_t{sizeof(T)}, bytes + sums_bytes};

  cudaError_t error = cudaSuccess;
  if (!channels_last) {
    const PlanePlan plan(params.shape, kPack<T>);
    error = launch(mp_silu_modulated_backward_planes<T, kDropout>, plan.work(), kThreads, stream, traffic, grad_y, x, c,
                   grad_x, sums, params.dropout, plan.chunks, channels, pixels, plan.lanes);
  } else if (channels % kPack<T> == 0 && all_aligned(grad_y, x, c, grad_x)) {
    const TilePlan plan(params.shape, kPack<T>);
    error = launch(mp_silu_modulated_backward_columns<T, kPack<T>, kDropout>, plan.tiles, plan.threads, stream, traffic,
                   grad_y, x, c, grad_x, sums, params.dropout, plan.tiles, channels, pixels);
  } else {
    const TilePlan plan(params.shape, 1);
    error = launch(mp_silu_modulated_backward_columns<T, 1, kDropout>, plan.tiles, plan.threads, stream, traffic,
                   grad_y, x, c, grad_x, sums, params.dropout, plan.tiles, channels, pixels);
  }
  if (error != cudaSuccess || chunks == 1) return error;
  return launch(mp_silu_modulated_add_chunks<T>, ceil_div(count, kThreads), kThreads, stream,
                {sums_bytes, count * int64_t{sizeof(T)}}, static_cast<const float*>(workspace), grad_c, chunks, count);
}

}  // namespace

int launch_mp_silu(const MPSiLUParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return forward<typename decltype(storage)::type>(params, stream); });
}

int launch_mp_silu_backward(const MPSiLUBackwardParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return backward<typename decltype(storage)::type>(params, stream); });
}

int launch_mp_silu_modulated(const MPSiLUModulatedParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    return params.dropout.philox ? modulated<T, true>(params, stream) : modulated<T, false>(params, stream);
  });
}

int64_t mp_silu_modulated_backward_workspace(const Activation& shape) {
  const int64_t chunks = shape.channels_last ? count_chunks<true>(shape.pixels) : count_chunks<false>(shape.pixels);
  return chunks > 1 ? chunks * shape.batch * shape.channels : 0;
}

int launch_mp_silu_modulated_backward(const MPSiLUModulatedBackwardParams& params, float* workspace,
                                      CUstream_st* stream) {
  return dispatch_storage(params.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    return params.dropout.philox ? modulated_backward<T, true>(params, workspace, stream)
                                 : modulated_backward<T, false>(params, workspace, stream);
  });
}

}  // namespace edm2::cuda
