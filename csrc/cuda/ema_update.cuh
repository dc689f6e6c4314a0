// Multi-tensor EMA update, ema += weight * (param - ema), weight = 1 - beta (Eq. 127): every profile of every tensor in
// one pass.
#pragma once

#include "device.cuh"

namespace edm2::cuda {

/// What one launch updates, passed as its parameter. Tensors are cut into chunks that blocks take in turn.
struct EMATable {
  static constexpr int kChunk = 8192;  // elements
  static constexpr int kTensors = 96;
  static constexpr int kProfiles = 32;
  static constexpr int kPointers = 320;

  float* pointers[kPointers];  // per tensor: the parameter, which is only read, then its average of every profile
  int64_t numel[kTensors];
  int32_t first_chunk[kTensors + 1];  // chunks of all tensors before
  int32_t tensors;
  int32_t profiles;
  float weights[kProfiles];

  /// The tensor that a chunk belongs to.
  __device__ int tensor_of(int chunk) const {
    int low = 0;
    int high = tensors - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

/// ema + weight * (target - ema), written such that weight 1 gives target exactly.
__device__ inline float interpolate(float ema, float target, float weight) {
  return weight < 0.5f ? ema + weight * (target - ema) : target - (1.0f - weight) * (target - ema);
}

__global__ void __launch_bounds__(kThreads) ema_update_chunks(const __grid_constant__ EMATable table) {
  const int chunks = table.first_chunk[table.tensors];
  for (int chunk = static_cast<int>(blockIdx.x); chunk < chunks; chunk += static_cast<int>(gridDim.x)) {
    const int tensor = table.tensor_of(chunk);
    const int64_t begin = int64_t{chunk - table.first_chunk[tensor]} * EMATable::kChunk;
    const int64_t rest = table.numel[tensor] - begin;
    const int64_t count = rest < EMATable::kChunk ? rest : EMATable::kChunk;
    float* const* pointers = table.pointers + tensor * (1 + table.profiles);
    const float* param = pointers[0] + begin;
    int64_t head = elements_to_boundary(count, param);
    for (int profile = 1; profile <= table.profiles; ++profile) {
      if (bytes_past_16(pointers[profile]) != bytes_past_16(pointers[0])) head = count;
    }
    for_each_pack<float>(count, head, threadIdx.x, kThreads, [&](auto width, int64_t i) {
      const auto target = load<width>(param + i);
      for (int profile = 0; profile < table.profiles; ++profile) {
        float* average = pointers[1 + profile] + begin + i;
        const float weight = table.weights[profile];
        store(average,
              map([weight](float e, float t) { return interpolate(e, t, weight); }, load<width>(average), target));
      }
    });
  }
}

}  // namespace edm2::cuda
