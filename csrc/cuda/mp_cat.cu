#include "edm2/mp_cat.h"

#include "launch.h"
#include "mp_cat.cuh"

namespace edm2::cuda {
namespace {

/// Calls body(units, Width<N>) with the rows in the largest units that both parts and all pointers allow.
template <typename T, typename Params, typename Body, typename... Ts>
cudaError_t in_units(const Params& params, Body body, const Ts*... pointers) {
  const auto& [rows, size_a, size_b] = CatRows{params.rows, params.size_a, params.size_b};
  if (size_a % kPack<T> == 0 && size_b % kPack<T> == 0 && all_aligned(pointers...)) {
    return body(CatRows{rows, size_a / kPack<T>, size_b / kPack<T>}, Width<kPack<T>>{});
  }
  return body(CatRows{rows, size_a, size_b}, Width<1>{});
}

int64_t blocks_for(const CatRows& units) { return ceil_div(units.rows * (units.size_a + units.size_b), kThreads); }

template <typename T>
cudaError_t forward(const MPCatParams& params, cudaStream_t stream) {
  const int64_t bytes = params.rows * (params.size_a + params.size_b) * int64_t{sizeof(T)};
  const int outputs = (params.out != nullptr ? 1 : 0) + (params.out_silu != nullptr ? 1 : 0);
  const Traffic traffic{bytes, outputs * bytes};
  return in_units<T>(
      params,
      [&](const CatRows& units, auto width) {
        return launch(mp_cat_units<T, width>, blocks_for(units), kThreads, stream, traffic,
                      static_cast<const T*>(params.a), static_cast<const T*>(params.b), static_cast<T*>(params.out),
                      static_cast<T*>(params.out_silu), units, static_cast<float>(params.weight_a),
                      static_cast<float>(params.weight_b));
      },
      params.a, params.b, params.out, params.out_silu);
}

template <typename T>
cudaError_t backward(const MPCatBackwardParams& params, cudaStream_t stream) {
  const int64_t bytes = params.rows * (params.size_a + params.size_b) * int64_t{sizeof(T)};
  const Traffic traffic{params.grad_silu != nullptr ? 3 * bytes : bytes, bytes};
  return in_units<T>(
      params,
      [&](const CatRows& units, auto width) {
        return launch(mp_cat_backward_units<T, width>, blocks_for(units), kThreads, stream, traffic,
                      static_cast<const T*>(params.grad_out), static_cast<const T*>(params.grad_silu),
                      static_cast<const T*>(params.out), static_cast<const T*>(params.a),
                      static_cast<const T*>(params.b), static_cast<T*>(params.grad_a), static_cast<T*>(params.grad_b),
                      units, static_cast<float>(params.weight_a), static_cast<float>(params.weight_b));
      },
      params.grad_out, params.grad_silu, params.out, params.a, params.b, params.grad_a, params.grad_b);
}

}  // namespace

int launch_mp_cat(const MPCatParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return forward<typename decltype(storage)::type>(params, stream); });
}

int launch_mp_cat_backward(const MPCatBackwardParams& params, CUstream_st* stream) {
  return dispatch_storage(params.dtype,
                          [&](auto storage) { return backward<typename decltype(storage)::type>(params, stream); });
}

}  // namespace edm2::cuda
