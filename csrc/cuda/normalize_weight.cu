#include "normalize_weight.cuh"

#include "edm2/normalize_weight.h"
#include "rows.h"

namespace edm2::cuda {
namespace {

bool has_kernel(DType dtype) { return dtype != DType::kFloat64; }

/// Normalises tensors [first, last), no more than the table holds.
template <int kTensors>
cudaError_t normalize(const NormalizeWeightParams& params, int64_t first, int64_t last, cudaStream_t stream) {
  WeightTable<kTensors> table;
  table.count = 0;
  table.items = 0;
  table.eps = static_cast<float>(params.eps);
  table.dtype = params.dtype;
  table.force = params.force;
  int64_t longest = 0;
  Traffic traffic{0, 0};
  for (int64_t i = first; i < last; ++i) {
    const WeightRows& t = params.tensors[i];
    const int64_t numel = t.rows * t.row_size;
    if (numel == 0) continue;
    if (!fits_table(t.rows, t.row_size, table.items) || !has_kernel(t.out_dtype)) return cudaErrorInvalidValue;
    const bool quads = t.row_size % kQuad == 0 && quad_aligned(t.w, params.dtype) && quad_aligned(t.out, t.out_dtype);
    table.tasks[table.count++] = {t.w,
                                  t.out,
                                  t.gain,
                                  t.out_dtype,
                                  static_cast<float>(t.factor),
                                  static_cast<int>(t.rows),
                                  static_cast<int>(t.row_size),
                                  static_cast<int>(t.inner),
                                  table.items,
                                  quads};
    table.items += static_cast<int>(items_of(t.rows, t.row_size));
    longest = std::max(longest, t.row_size);
    traffic.read += numel * size_of(params.dtype);
    traffic.written += numel * (params.force ? size_of(params.dtype) : 0);
    traffic.written += numel * (t.out != nullptr ? size_of(t.out_dtype) : 0);
  }
  int shared = 0;
  const cudaError_t error = shared_for_rows(longest, 1, stream, &shared);
  if (error != cudaSuccess) return error;
  table.capacity = shared / 4;
  return launch_with_shared(shared, normalize_weight_rows<kTensors>, table.items, kThreads, stream, traffic, table);
}

template <int kTensors>
cudaError_t backward(const NormalizeWeightBackwardParams& params, int64_t first, int64_t last, cudaStream_t stream) {
  WeightBackwardTable<kTensors> table;
  table.count = 0;
  table.items = 0;
  table.eps = static_cast<float>(params.eps);
  table.dtype = params.dtype;
  table.grad_dtype = params.grad_dtype;
  int64_t longest = 0;
  Traffic traffic{0, 0};
  Traffic sums_traffic{0, 0};
  for (int64_t i = first; i < last; ++i) {
    const WeightRowsBackward& t = params.tensors[i];
    const int64_t numel = t.rows * t.row_size;
    if (numel == 0 && t.grad_gain == nullptr) continue;
    if (!fits_table(t.rows, t.row_size, table.items)) return cudaErrorInvalidValue;
    const bool quads = t.row_size % kQuad == 0 && quad_aligned(t.w, params.dtype) &&
                       quad_aligned(t.grad, params.grad_dtype) && quad_aligned(t.grad_w, params.dtype);
    const int items = numel == 0 ? 0 : static_cast<int>(items_of(t.rows, t.row_size));
    table.tasks[table.count++] = {t.grad,
                                  t.w,
                                  t.grad_w,
                                  static_cast<float*>(t.row_dots),
                                  t.grad_gain,
                                  t.gain,
                                  static_cast<float>(t.factor),
                                  static_cast<float>(t.gain_grad_factor),
                                  static_cast<int>(t.rows),
                                  static_cast<int>(t.row_size),
                                  table.items,
                                  quads};
    table.items += items;
    longest = std::max(longest, t.row_size);
    traffic.read += numel * (size_of(params.dtype) + size_of(params.grad_dtype));
    traffic.written += numel * size_of(params.dtype);
    if (t.grad_gain == nullptr) continue;
    traffic.written += t.rows * 4;
    sums_traffic.read += t.rows * 4;
    sums_traffic.written += 4;
  }
  int shared = 0;
  cudaError_t error = shared_for_rows(longest, 2, stream, &shared);
  if (error != cudaSuccess) return error;
  table.capacity = shared / 4;
  error = launch_with_shared(shared, normalize_weight_backward_rows<kTensors>, table.items, kThreads, stream, traffic,
                             table);
  if (error != cudaSuccess || sums_traffic.written == 0) return error;
  return launch(sum_gain_gradients<kTensors>, ceil_div(table.count, kWarps), kThreads, stream, sums_traffic, table);
}

/// Calls body(Width<kTensors>, first, last) for parts of [0, count) that fit a table: one small table, or large ones.
template <int kMany, typename Body>
cudaError_t in_tables(int64_t count, Body body) {
  constexpr int kFew = 2;
  if (count <= kFew) return body(Width<kFew>{}, 0, count);
  for (int64_t first = 0; first < count; first += kMany) {
    const cudaError_t error = body(Width<kMany>{}, first, std::min<int64_t>(count, first + kMany));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int launch_normalize_weight(const NormalizeWeightParams& params, CUstream_st* stream) {
  if (!has_kernel(params.dtype)) return cudaErrorInvalidValue;
  return in_tables<kManyWeights>(params.num_tensors, [&](auto tensors, int64_t first, int64_t last) {
    return normalize<tensors>(params, first, last, stream);
  });
}

int launch_normalize_weight_backward(const NormalizeWeightBackwardParams& params, CUstream_st* stream) {
  if (!has_kernel(params.dtype) || !has_kernel(params.grad_dtype)) return cudaErrorInvalidValue;
  return in_tables<kManyWeightsBackward>(params.num_tensors, [&](auto tensors, int64_t first, int64_t last) {
    return backward<tensors>(params, first, last, stream);
  });
}

}  // namespace edm2::cuda
