#include "edm2/adam_step.h"

#include <cmath>
#include <initializer_list>
#include <vector>

#include "adam_step.cuh"
#include "edm2/normalize_weight.h"
#include "rows.h"

namespace edm2::cuda {
namespace {

AdamTable empty_table(const AdamStepParams& params) {
  AdamTable table;
  table.scalars = params.scalars;
  table.loss_scale = params.loss_scale;
  table.count = 0;
  table.items = 0;
  table.capacity = 0;
  table.profiles = static_cast<int>(params.profiles);
  table.beta2 = static_cast<float>(params.beta2);
  table.one_minus_beta1 = static_cast<float>(1 - params.beta1);
  table.one_minus_beta2 = static_cast<float>(1 - params.beta2);
  table.eps = static_cast<float>(params.eps);
  table.norm_eps = static_cast<float>(params.norm_eps);
  table.effective = params.effective;
  table.force = params.force;
  return table;
}

/// Fills tables with tensors and launches them when full.
class Filler {
 public:
  using Kernel = void (*)(AdamTable);

  Filler(const AdamStepParams& params, Kernel kernel, int floats, CUstream_st* stream)
      : params_(params), kernel_(kernel), floats_(floats), stream_(stream), table_(empty_table(params)) {}

  /// Appends a tensor with its pointers, and what it makes the launch read and write.
  cudaError_t append(AdamTask task, int64_t items, void* const* pointers, std::initializer_list<void*> more,
                     Traffic traffic) {
    const int64_t count = params_.profiles + static_cast<int64_t>(more.size());
    if (count > AdamTable::kPointers) return cudaErrorInvalidValue;
    if (table_.count == AdamTable::kTensors || pointers_ + count > AdamTable::kPointers ||
        table_.items + items > INT32_MAX) {
      const cudaError_t error = flush();
      if (error != cudaSuccess) return error;
    }
    task.first_item = table_.items;
    task.first_pointer = static_cast<int>(pointers_);
    for (int64_t k = 0; k < params_.profiles; ++k) table_.pointers[pointers_++] = static_cast<float*>(pointers[k]);
    for (void* pointer : more) table_.pointers[pointers_++] = static_cast<float*>(pointer);
    table_.tasks[table_.count++] = task;
    table_.items += static_cast<int>(items);
    longest_ = std::max<int64_t>(longest_, task.weight ? task.row_size : 0);
    traffic_.read += traffic.read;
    traffic_.written += traffic.written;
    return cudaSuccess;
  }

  /// Launches what there is.
  cudaError_t flush() {
    int shared = 0;
    cudaError_t error = cudaSuccess;
    if (longest_ > 0) error = shared_for_rows(longest_, floats_, stream_, &shared);
    if (error != cudaSuccess) return error;
    table_.capacity = shared / 4;
    error = launch_with_shared(shared, kernel_, table_.items, kThreads, stream_, traffic_, table_);
    table_.count = 0;
    table_.items = 0;
    pointers_ = 0;
    longest_ = 0;
    traffic_ = {0, 0};
    return error;
  }

 private:
  const AdamStepParams& params_;
  Kernel kernel_;
  int floats_;
  CUstream_st* stream_;
  AdamTable table_;
  int64_t pointers_ = 0;
  int64_t longest_ = 0;
  Traffic traffic_{0, 0};
};

/// A parameter without rows counts as rows of kPlainRow elements, the last one shorter.
int64_t row_size_of(const AdamTensor& t) {
  return t.weight ? t.row_size : std::min<int64_t>(t.rows * t.row_size, kPlainRow);
}

/// The tensor's part of a table.
AdamTask task_of(const AdamStepParams& params, const AdamTensor& t) {
  const int64_t numel = t.rows * t.row_size;
  const int64_t row_size = row_size_of(t);
  bool quads = t.weight ? row_size % kQuad == 0 : numel % kQuad == 0;
  quads = quads && all_aligned(t.param, t.grad, t.exp_avg, t.exp_avg_sq) &&
          (t.prepared == nullptr || quad_aligned(t.prepared, t.prepared_dtype));
  for (int64_t k = 0; k < params.profiles; ++k) quads = quads && all_aligned(t.emas[k]);
  AdamTask task = {};
  task.param = static_cast<float*>(t.param);
  task.grad = static_cast<const float*>(t.grad);
  task.exp_avg = static_cast<float*>(t.exp_avg);
  task.exp_avg_sq = static_cast<float*>(t.exp_avg_sq);
  task.prepared = t.prepared;
  task.gain = static_cast<const float*>(t.gain);
  task.row_dots = static_cast<float*>(t.row_dots);
  task.nonfinite = reinterpret_cast<unsigned long long*>(t.nonfinite);
  task.numel = numel;
  task.rows = static_cast<int>(t.weight ? t.rows : ceil_div(numel, row_size));
  task.row_size = static_cast<int>(row_size);
  task.inner = static_cast<int>(t.inner);
  task.prepared_dtype = t.prepared_dtype;
  task.weight = t.weight;
  task.quads = quads;
  return task;
}

cudaError_t step_rows(const AdamStepParams& params, CUstream_st* stream) {
  Filler filler(params, adam_rows, params.effective ? 2 : 1, stream);
  for (int64_t i = 0; i < params.num_tensors; ++i) {
    const AdamTensor& t = params.tensors[i];
    const int64_t numel = t.rows * t.row_size;
    if (numel == 0) continue;
    if (t.prepared != nullptr && t.prepared_dtype == DType::kFloat64) return cudaErrorInvalidValue;
    if (!fits_table(ceil_div(numel, row_size_of(t)), row_size_of(t), 0)) return cudaErrorInvalidValue;
    const AdamTask task = task_of(params, t);
    Traffic traffic{4 * numel * (4 + params.profiles), 4 * numel * (3 + params.profiles)};
    if (t.prepared != nullptr && t.gain == nullptr) traffic.written += numel * size_of(t.prepared_dtype);
    if (t.row_dots != nullptr) traffic.written += 4 * t.rows;
    cudaError_t error = cudaSuccess;
    if (t.row_dots != nullptr) {
      error =
          filler.append(task, items_of(task.rows, task.row_size), t.emas, {t.gain_exp_avg, t.gain_exp_avg_sq}, traffic);
    } else {
      error = filler.append(task, items_of(task.rows, task.row_size), t.emas, {}, traffic);
    }
    if (error != cudaSuccess) return error;
  }
  return filler.flush();
}

cudaError_t step_gains(const AdamStepParams& params, CUstream_st* stream) {
  Filler filler(params, adam_gains, 1, stream);
  for (int64_t i = 0; i < params.num_tensors; ++i) {
    const AdamTensor& t = params.tensors[i];
    const int64_t numel = t.rows * t.row_size;
    if (numel == 0 || t.row_dots == nullptr) continue;
    const AdamTask task = task_of(params, t);
    const int64_t items = t.prepared == nullptr ? 1 : items_of(task.rows, task.row_size);
    Traffic traffic{4 * (t.rows + 3 + params.profiles), 4 * (3 + params.profiles)};
    if (t.prepared != nullptr) {
      traffic.read += 4 * numel;
      traffic.written += numel * size_of(t.prepared_dtype);
    }
    const cudaError_t error = filler.append(task, items, t.gain_emas, {t.gain_exp_avg, t.gain_exp_avg_sq}, traffic);
    if (error != cudaSuccess) return error;
  }
  return filler.flush();
}

/// Effective weights of which the gain is a parameter with a gradient of its own, stepped by now.
cudaError_t prepare_with_gains(const AdamStepParams& params, CUstream_st* stream) {
  std::vector<WeightRows> weights;
  for (int64_t i = 0; i < params.num_tensors; ++i) {
    const AdamTensor& t = params.tensors[i];
    if (t.gain == nullptr || t.row_dots != nullptr || t.prepared == nullptr) continue;
    const double factor = t.row_size > 0 ? 1 / std::sqrt(static_cast<double>(t.row_size)) : 0;
    weights.push_back({t.param, t.prepared, t.rows, t.row_size, t.inner, static_cast<const float*>(t.gain), factor,
                       t.prepared_dtype});
  }
  return static_cast<cudaError_t>(launch_normalize_weight(
      {weights.data(), nullptr, static_cast<int64_t>(weights.size()), DType::kFloat32, params.norm_eps, false},
      stream));
}

}  // namespace

int launch_adam_step(const AdamStepParams& params, CUstream_st* stream) {
  if (params.dtype != DType::kFloat32) return cudaErrorInvalidValue;
  cudaError_t error = step_rows(params, stream);
  if (error == cudaSuccess) error = params.effective ? step_gains(params, stream) : prepare_with_gains(params, stream);
  return error;
}

}  // namespace edm2::cuda
