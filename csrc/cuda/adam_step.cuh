// One optimizer step over the rows of all parameters; what the gains need, whose gradients sum over rows, follows in a
// second kernel.
#pragma once

#include "normalize_weight.cuh"

namespace edm2::cuda {

/// Elements of a parameter without rows that a block takes at a time.
inline constexpr int kPlainRow = 4096;

/// One parameter of a launch.
struct AdamTask {
  float* param;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  void* prepared;
  const float* gain;
  float* row_dots;  // rows, then three floats: the gain and its exp_avg and exp_avg_sq before the step
  unsigned long long* nonfinite;
  int64_t numel;
  int rows;
  int row_size;
  int inner;
  int first_item;
  DType prepared_dtype;
  int first_pointer;  // in the table: the averages, then, with row_dots, the gain's exp_avg and exp_avg_sq
  bool weight;
  bool quads;
};

/// What one launch steps.
struct AdamTable {
  static constexpr int kTensors = 250;
  static constexpr int kPointers = 800;

  AdamTask tasks[kTensors];
  float* pointers[kPointers];
  const double* scalars;
  const float* loss_scale;
  int count;
  int items;
  int capacity;
  int profiles;
  float beta2;
  float one_minus_beta1;
  float one_minus_beta2;
  float eps;
  float norm_eps;
  bool effective;
  bool force;
};

/// The constants of a step.
struct AdamConstants {
  float step_size;         // lr / (1 - beta1^step)
  float bias_correction2;  // sqrt(1 - beta2^step)
  float inverse_loss_scale;

  __device__ explicit AdamConstants(const AdamTable& table)
      : step_size(static_cast<float>(table.scalars[0])),
        bias_correction2(static_cast<float>(table.scalars[1])),
        inverse_loss_scale(table.loss_scale == nullptr ? 1.0f : 1.0f / *table.loss_scale) {}
};

/// Adam for one element with gradient g (torch's formula); returns the parameter's new value.
__device__ inline float adam(const AdamTable& table, const AdamConstants& constants, float w, float g, float& exp_avg,
                             float& exp_avg_sq) {
  exp_avg += table.one_minus_beta1 * (g - exp_avg);
  exp_avg_sq = table.beta2 * exp_avg_sq + table.one_minus_beta2 * g * g;
  return w - constants.step_size * exp_avg / (sqrtf(exp_avg_sq) / constants.bias_correction2 + table.eps);
}

/// ema + weight * (target - ema), written such that weight 1 gives target exactly.
__device__ inline float average(float ema, float target, float weight) {
  return weight < 0.5f ? ema + weight * (target - ema) : target - (1.0f - weight) * (target - ema);
}

/// Averages loaded together with the parameter; further ones follow one by one.
inline constexpr int kAveragesAtOnce = 2;

/// What the update of N elements reads.
template <int N>
struct AdamElements {
  Floats<N> w;
  Floats<N> grad;
  Floats<N> exp_avg;
  Floats<N> exp_avg_sq;
  Floats<N> emas[kAveragesAtOnce];
};

/// One parameter's row at work. Gradients of effective weights become those of weights.
struct AdamRow {
  const AdamTable& table;
  const AdamTask& task;
  const AdamConstants constants;
  int64_t at;  // of the row in the tensor
  int size;
  float* held_w;  // what the team holds of the row; null: nothing
  float* held_grad;

  template <int N>
  __device__ Floats<N> unscaled(const Floats<N>& grad) const {
    return grad * constants.inverse_loss_scale;
  }

  template <int N>
  __device__ static Floats<N> finite(const Floats<N>& grad) {
    return map([](float g) { return g - g == 0.0f ? g : 0.0f; }, grad);
  }

  /// Elements that finite() zeroes.
  template <int N>
  __device__ static int count_nonfinite(const Floats<N>& grad) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) count += grad.v[i] - grad.v[i] == 0.0f ? 0 : 1;
    return count;
  }

  __device__ float* ema(int profile) const { return table.pointers[task.first_pointer + profile] + at; }

  /// Sums over the row of w^2 and of grad * w; holds both.
  __device__ Floats<2> sums_with_gradient(const Team& team, int& nonfinite) const {
    Floats<2> sums = {};
    team.for_each<2>(
        size, task.quads,
        [&](auto width, int i) {
          return RawPair<width.value>{Raw<width.value>::load(task.param + at, DType::kFloat32, i),
                                      Raw<width.value>::load(task.grad + at, DType::kFloat32, i)};
        },
        [&](auto, int i, const auto& raw) {
          const auto w = raw.first.template as<float>();
          const auto scaled = unscaled(raw.second.template as<float>());
          nonfinite += count_nonfinite(scaled);
          const auto grad = finite(scaled);
          sums.v[0] += sum(w * w);
          sums.v[1] += sum(grad * w);
          if (held_w == nullptr) return;
          store(held_w + i, w);
          store(held_grad + i, grad);
        });
    return team.sum(sums);
  }

  /// Adam and averages with gradient grad * of_grad - w * of_w; returns the thread's part of the row's new sum of
  /// squares. New values are held; without that, or with `keep`, they go to the parameter.
  __device__ float update(const Team& team, bool gradient_held, float of_grad, float of_w, bool keep,
                          int& nonfinite) const {
    float squares = 0.0f;
    const int at_once = table.profiles < kAveragesAtOnce ? table.profiles : kAveragesAtOnce;
    team.for_each<1>(
        size, task.quads,
        [&](auto width, int i) {
          AdamElements<width.value> x;
          if (!gradient_held) {
            x.w = load<width.value>(task.param + at + i);
            x.grad = load<width.value>(task.grad + at + i);
          }
          x.exp_avg = load<width.value>(task.exp_avg + at + i);
          x.exp_avg_sq = load<width.value>(task.exp_avg_sq + at + i);
#pragma unroll
          for (int k = 0; k < kAveragesAtOnce; ++k) {
            if (k < at_once) x.emas[k] = load<width.value>(ema(k) + i);
          }
          return x;
        },
        [&](auto width, int i, const auto& loaded) {
          auto x = loaded;
          if (gradient_held) {
            x.w = load<width.value>(held_w + i);
            x.grad = load<width.value>(held_grad + i);
          } else {
            x.grad = unscaled(x.grad);
            nonfinite += count_nonfinite(x.grad);
            x.grad = finite(x.grad);
          }
#pragma unroll
          for (int j = 0; j < width.value; ++j) {
            const float g = x.grad.v[j] * of_grad - x.w.v[j] * of_w;
            x.w.v[j] = adam(table, constants, x.w.v[j], g, x.exp_avg.v[j], x.exp_avg_sq.v[j]);
          }
          store(task.exp_avg + at + i, x.exp_avg);
          store(task.exp_avg_sq + at + i, x.exp_avg_sq);
          const auto average_into = [&](int k, const auto& ema_before) {
            const float weight = static_cast<float>(table.scalars[2 + k]);
            store(ema(k) + i, map([weight](float e, float t) { return average(e, t, weight); }, ema_before, x.w));
          };
#pragma unroll
          for (int k = 0; k < kAveragesAtOnce; ++k) {
            if (k < at_once) average_into(k, x.emas[k]);
          }
#pragma unroll 1
          for (int k = at_once; k < table.profiles; ++k) average_into(k, load<width.value>(ema(k) + i));
          squares += sum(x.w * x.w);
          if (held_w != nullptr) store(held_w + i, x.w);
          if (held_w == nullptr || keep) store(task.param + at + i, x.w);
        });
    return squares;
  }
};

__device__ inline void adam_row(const AdamTable& table, const AdamTask& task, const Team& team, int64_t row) {
  const bool effective = task.weight && table.effective;
  const int64_t at = row * task.row_size;
  const int size = static_cast<int>(task.numel - at < task.row_size ? task.numel - at : task.row_size);
  const int floats = table.effective ? 2 : 1;
  float* const held = task.weight ? row_memory(team, task.row_size, floats, table.capacity) : nullptr;
  float* const held_grad = effective && held != nullptr ? held + (size > kShortRow ? size : kShortRow) : nullptr;
  const AdamRow own{table, task, AdamConstants(table), at, size, held, held_grad};

  float of_grad = 1.0f;
  float of_w = 0.0f;
  int nonfinite = 0;
  if (effective) {
    const float gain = task.gain == nullptr ? 1.0f : *task.gain;
    const Floats<2> sums = own.sums_with_gradient(team, nonfinite);
    const WeightGradient gradient(sums, size, table.norm_eps, gain / sqrtf(static_cast<float>(size)));
    of_grad = gradient.of_grad;
    of_w = gradient.of_w;
    if (task.row_dots != nullptr && team.rank == 0) {
      task.row_dots[row] = gradient.dot;
      if (row == 0) {
        task.row_dots[task.rows] = gain;
        task.row_dots[task.rows + 1] = *table.pointers[task.first_pointer + table.profiles];
        task.row_dots[task.rows + 2] = *table.pointers[task.first_pointer + table.profiles + 1];
      }
    }
  }
  int again = 0;  // elements counted before
  float squares =
      own.update(team, effective && held != nullptr, of_grad, of_w, !table.force, effective ? again : nonfinite);
  if (nonfinite > 0) atomicAdd(task.nonfinite, static_cast<unsigned long long>(nonfinite));
  const bool wanted = task.prepared != nullptr && task.gain == nullptr;
  if (!task.weight || !(table.force || wanted)) return;
  squares = team.sum(Floats<1>{squares}).v[0];
  const NormalizedRow updated{task.param + at, held, size, task.quads, DType::kFloat32};
  void* const out = wanted ? advanced(task.prepared, task.prepared_dtype, at) : nullptr;
  updated.write(team, squares, table.norm_eps, table.force, out, task.prepared_dtype, task.inner,
                1.0f / sqrtf(static_cast<float>(size)));
}

__global__ void __launch_bounds__(kThreads, kResidentBlocks<12>) adam_rows(const __grid_constant__ AdamTable table) {
  for (int item = static_cast<int>(blockIdx.x); item < table.items; item += static_cast<int>(gridDim.x)) {
    const AdamTask& task =
        table.tasks[last_not_above(item, table.count, [&](int t) { return table.tasks[t].first_item; })];
    const Team team(task.row_size);
    const int64_t row = int64_t{item - task.first_item} * Team::teams(task.row_size) + team.index;
    if (row < task.rows) adam_row(table, task, team, row);
    __syncthreads();  // the next item overwrites shared memory
  }
}

/// Adam and averages for the gains, and the effective weights that they are a factor of: every warp computes the gain's
/// new value for itself, the first one of the tensor stores it. Tasks are those with row_dots; where nothing is
/// prepared, only their first rows.
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>) adam_gains(const __grid_constant__ AdamTable table) {
  for (int item = static_cast<int>(blockIdx.x); item < table.items; item += static_cast<int>(gridDim.x)) {
    const AdamTask& task =
        table.tasks[last_not_above(item, table.count, [&](int t) { return table.tasks[t].first_item; })];
    const Team team(task.row_size);
    const int n = task.row_size;
    const float inverse_root = 1.0f / sqrtf(static_cast<float>(n));
    const float* before = task.row_dots + task.rows;
    const double dots = sum_of_column(task.row_dots, task.rows, static_cast<int>(threadIdx.x) % kWarpSize);
    float exp_avg = before[1];
    float exp_avg_sq = before[2];
    const float gain =
        adam(table, AdamConstants(table), before[0], static_cast<float>(dots * inverse_root), exp_avg, exp_avg_sq);
    if (item == task.first_item && threadIdx.x == 0) {
      float* const* pointers = table.pointers + task.first_pointer;
      *const_cast<float*>(task.gain) = gain;
      *pointers[table.profiles] = exp_avg;
      *pointers[table.profiles + 1] = exp_avg_sq;
      for (int k = 0; k < table.profiles; ++k) {
        *pointers[k] = average(*pointers[k], gain, static_cast<float>(table.scalars[2 + k]));
      }
    }
    const int64_t row = int64_t{item - task.first_item} * Team::teams(n) + team.index;
    if (task.prepared != nullptr && row < task.rows) {
      const NormalizedRow own{task.param + row * n, row_memory(team, n, 1, table.capacity), n, task.quads,
                              DType::kFloat32};
      const float squares = hold_row(team, own);
      own.write(team, squares, table.norm_eps, false, advanced(task.prepared, task.prepared_dtype, row * n),
                task.prepared_dtype, task.inner, gain * inverse_root);
    }
    __syncthreads();  // the next item overwrites shared memory
  }
}

}  // namespace edm2::cuda
