#include "edm2/ema_update.h"

#include <numeric>

#include "ema_update.cuh"
#include "launch.h"

namespace edm2::cuda {
namespace {

/// Appends a tensor with its averages of profiles [first, first + table.profiles).
void append(EMATable* table, const EMATensor& tensor, int64_t first) {
  float** pointers = table->pointers + table->tensors * (1 + table->profiles);
  *pointers++ = static_cast<float*>(const_cast<void*>(tensor.param));
  for (int64_t k = first; k < first + table->profiles; ++k) *pointers++ = static_cast<float*>(tensor.emas[k]);
  const auto chunks = static_cast<int32_t>(ceil_div(tensor.numel, EMATable::kChunk));
  table->numel[table->tensors] = tensor.numel;
  table->first_chunk[table->tensors + 1] = table->first_chunk[table->tensors] + chunks;
  ++table->tensors;
}

/// Updates profiles [first, last) of all tensors, in as many launches as the table needs.
cudaError_t update_profiles(const EMAUpdateParams& params, int64_t first, int64_t last, cudaStream_t stream) {
  EMATable table = {};
  table.profiles = static_cast<int32_t>(last - first);
  for (int64_t k = first; k < last; ++k) table.weights[k - first] = static_cast<float>(params.weights[k]);
  const int64_t capacity = std::min<int64_t>(EMATable::kTensors, EMATable::kPointers / (1 + table.profiles));
  for (int64_t t = 0; t < params.num_tensors; ++t) {
    if (params.tensors[t].numel > 0) append(&table, params.tensors[t], first);
    if (table.tensors < capacity && t + 1 < params.num_tensors) continue;
    const int64_t numel = std::accumulate(table.numel, table.numel + table.tensors, int64_t{0});
    const Traffic traffic{4 * numel * (1 + table.profiles), 4 * numel * table.profiles};
    const cudaError_t error =
        launch(ema_update_chunks, table.first_chunk[table.tensors], kThreads, stream, traffic, table);
    if (error != cudaSuccess) return error;
    table.tensors = 0;
  }
  return cudaSuccess;
}

}  // namespace

int launch_ema_update(const EMAUpdateParams& params, CUstream_st* stream) {
  if (params.dtype != DType::kFloat32) return cudaErrorInvalidValue;
  for (int64_t first = 0; first < params.profiles; first += EMATable::kProfiles) {
    const int64_t last = std::min<int64_t>(params.profiles, first + EMATable::kProfiles);
    const cudaError_t error = update_profiles(params, first, last, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace edm2::cuda
