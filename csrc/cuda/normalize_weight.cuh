// Weight normalisation over rows, forced, effective, or both in one pass, and its backward (spec 2.1 and 2.6).
#pragma once

#include "rows.cuh"

namespace edm2::cuda {

/// One weight tensor of a launch.
struct WeightTask {
  void* w;
  void* out;
  const float* gain;
  DType out_dtype;
  float factor;
  int rows;
  int row_size;
  int inner;
  int first_item;  // items of all tensors before; an item is a row, or as many short ones as a block has warps
  bool quads;      // four elements at a time: row size and pointers allow it
};

/// What one launch normalises. Small tables keep single tensors' launches light.
template <int kTensors>
struct WeightTable {
  WeightTask tasks[kTensors];
  int count;
  int items;
  int capacity;  // floats of dynamic shared memory
  float eps;
  DType dtype;
  bool force;
};

inline constexpr int kManyWeights = 580;

/// A row whose sum of squares is known, in memory and, unless it is too long, held by its team.
struct NormalizedRow {
  void* w;
  float* held;
  int size;
  bool quads;
  DType dtype;

  /// Overwrites w by its normalised value if `force`, and writes w * (factor / (eps + rms)) to `out`, unless that is
  /// null, transposed as [size / inner, inner].
  __device__ void write(const Team& team, float squares, float eps, bool force, void* out, DType out_dtype, int inner,
                        float factor) const {
    const RowNorm norm(squares, size, eps);
    // The rows that forced normalisation leaves have rms / s for their rms.
    const float scale = math::divide(factor, force ? eps + norm.rms / norm.s : norm.s);
    const bool transposed = out != nullptr && inner > 1;
    if (force || !transposed) {
      team.for_each<4>(
          size, quads,
          [&](auto width, int i) { return held != nullptr ? Raw<width.value>{} : Raw<width.value>::load(w, dtype, i); },
          [&](auto width, int i, const auto& raw) {
            Floats<width.value> x = held != nullptr ? load<width.value>(held + i) : raw.floats(dtype);
            if (force) {
              x = map([&](float v) { return v / norm.s; }, x);
              store_as(w, dtype, i, x);
              if (transposed && held != nullptr) store(held + i, x);
            }
            if (out != nullptr && !transposed) store_as(out, out_dtype, i, x * scale);
          });
    }
    if (!transposed) return;
    if (force) team.sync();
    const Transposed target{out, out_dtype, size, inner, quads && size / inner % kQuad == 0};
    target.write(team, [&](int i) {
      return scale * (held != nullptr ? held[i] : Raw<1>::load(w, dtype, i).floats(dtype).v[0]);
    });
  }
};

/// Reads a row, holds it if it fits, and returns its sum of squares.
__device__ inline float hold_row(const Team& team, const NormalizedRow& row) {
  float squares = 0.0f;
  team.for_each<4>(
      row.size, row.quads, [&](auto width, int i) { return Raw<width.value>::load(row.w, row.dtype, i); },
      [&](auto width, int i, const auto& raw) {
        const Floats<width.value> x = raw.floats(row.dtype);
        squares += sum(x * x);
        if (row.held != nullptr) store(row.held + i, x);
      });
  return team.sum(Floats<1>{squares}).v[0];
}

template <int kTensors>
__device__ void normalize_row(const WeightTable<kTensors>& table, const WeightTask& task, const Team& team,
                              int64_t row) {
  const int n = task.row_size;
  const NormalizedRow own{advanced(task.w, table.dtype, row * n), row_memory(team, n, 1, table.capacity), n, task.quads,
                          table.dtype};
  void* const out = task.out == nullptr ? nullptr : advanced(task.out, task.out_dtype, row * n);
  const float squares = hold_row(team, own);
  const float gain = task.gain == nullptr ? 1.0f : *task.gain;
  own.write(team, squares, table.eps, table.force, out, task.out_dtype, task.inner, task.factor * gain);
}

template <int kTensors>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    normalize_weight_rows(const __grid_constant__ WeightTable<kTensors> table) {
  for (int item = static_cast<int>(blockIdx.x); item < table.items; item += static_cast<int>(gridDim.x)) {
    const WeightTask& task =
        table.tasks[last_not_above(item, table.count, [&](int t) { return table.tasks[t].first_item; })];
    const Team team(task.row_size);
    const int64_t row = int64_t{item - task.first_item} * Team::teams(task.row_size) + team.index;
    if (row < task.rows) normalize_row(table, task, team, row);
    __syncthreads();  // the next item overwrites shared memory
  }
}

/// One weight tensor of a launch of the backward.
struct WeightBackwardTask {
  const void* grad;
  const void* w;
  void* grad_w;
  float* row_dots;
  float* grad_gain;
  const float* gain;
  float factor;
  float gain_grad_factor;
  int rows;
  int row_size;
  int first_item;
  bool quads;
};

template <int kTensors>
struct WeightBackwardTable {
  WeightBackwardTask tasks[kTensors];
  int count;
  int items;
  int capacity;
  float eps;
  DType dtype;
  DType grad_dtype;
};

inline constexpr int kManyWeightsBackward = 450;

/// What the gradient of a row's effective weight (spec 2.6) consists of: grad * of_grad - w * of_w, from the sums over
/// the row of w^2 and of grad * w.
struct WeightGradient {
  float of_grad;
  float of_w;
  float dot;  // <grad, y>

  __device__ WeightGradient(const Floats<2>& sums, int row_size, float eps, float factor) {
    const RowNorm norm(sums.v[0], row_size, eps);
    const float inverse = math::divide(1.0f, norm.s);
    of_grad = factor * inverse;
    of_w = factor * math::normalize_grad_coef(sums.v[1], inverse, norm.rms, static_cast<float>(row_size));
    dot = sums.v[1] * inverse;
  }
};

template <int kTensors>
__device__ void normalize_row_backward(const WeightBackwardTable<kTensors>& table, const WeightBackwardTask& task,
                                       const Team& team, int64_t row) {
  const int n = task.row_size;
  const void* const w = advanced(task.w, table.dtype, row * n);
  const void* const grad = advanced(task.grad, table.grad_dtype, row * n);
  void* const grad_w = advanced(task.grad_w, table.dtype, row * n);
  float* const held_w = row_memory(team, n, 2, table.capacity);
  float* const held_grad = held_w == nullptr ? nullptr : held_w + (n > kShortRow ? n : kShortRow);

  const auto load_pair = [&](auto width, int i) {
    return RawPair<width.value>{Raw<width.value>::load(w, table.dtype, i),
                                Raw<width.value>::load(grad, table.grad_dtype, i)};
  };
  Floats<2> sums = {};
  team.for_each<4>(n, task.quads, load_pair, [&](auto width, int i, const auto& raw) {
    const Floats<width.value> x = raw.first.floats(table.dtype);
    const Floats<width.value> g = raw.second.floats(table.grad_dtype);
    sums.v[0] += sum(x * x);
    sums.v[1] += sum(g * x);
    if (held_w == nullptr) return;
    store(held_w + i, x);
    store(held_grad + i, g);
  });
  const float gain = task.gain == nullptr ? 1.0f : *task.gain;
  const WeightGradient gradient(team.sum(sums), n, table.eps, task.factor * gain);
  team.for_each<4>(
      n, task.quads,
      [&](auto width, int i) { return held_w != nullptr ? RawPair<width.value>{} : load_pair(width, i); },
      [&](auto width, int i, const auto& raw) {
        const Floats<width.value> x = held_w != nullptr ? load<width.value>(held_w + i) : raw.first.floats(table.dtype);
        const Floats<width.value> g =
            held_w != nullptr ? load<width.value>(held_grad + i) : raw.second.floats(table.grad_dtype);
        store_as(grad_w, table.dtype, i, g * gradient.of_grad - x * gradient.of_w);
      });
  if (task.row_dots != nullptr && team.rank == 0) task.row_dots[row] = gradient.dot;
}

template <int kTensors>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<8>)
    normalize_weight_backward_rows(const __grid_constant__ WeightBackwardTable<kTensors> table) {
  for (int item = static_cast<int>(blockIdx.x); item < table.items; item += static_cast<int>(gridDim.x)) {
    const WeightBackwardTask& task =
        table.tasks[last_not_above(item, table.count, [&](int t) { return table.tasks[t].first_item; })];
    const Team team(task.row_size);
    const int64_t row = int64_t{item - task.first_item} * Team::teams(task.row_size) + team.index;
    if (row < task.rows) normalize_row_backward(table, task, team, row);
    __syncthreads();  // the next item overwrites shared memory
  }
}

/// The gains' gradients: for each tensor that wants it, a warp sums up its rows' shares.
template <int kTensors>
__global__ void __launch_bounds__(kThreads)
    sum_gain_gradients(const __grid_constant__ WeightBackwardTable<kTensors> table) {
  const LaneGroups groups(kWarpSize);
  for (int64_t t = groups.first; t < table.count; t += groups.step) {
    const WeightBackwardTask& task = table.tasks[t];
    if (task.grad_gain == nullptr) continue;
    const double total = sum_of_column(task.row_dots, task.rows, groups.lane);
    if (groups.lane == 0) *task.grad_gain = static_cast<float>(total * task.gain_grad_factor);
  }
}

}  // namespace edm2::cuda
