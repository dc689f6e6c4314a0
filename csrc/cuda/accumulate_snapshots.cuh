// Weighted sums of snapshots, out[m] += sum_n coefs[n, m] * inputs[n], optionally compensated.
//
// A block keeps a tile of every input in shared memory, and its threads share out the outputs: inputs are read once,
// and outputs read and written once, however many there are.
#pragma once

#include "device.cuh"
#include "edm2/common.h"

namespace edm2::cuda {

/// What one launch works on, passed as its parameter.
template <int kMostInputs, int kMostCoefs, int kMostTileFloats>
struct SnapshotTable {
  static constexpr int kInputs = kMostInputs;
  static constexpr int kCoefs = kMostCoefs;
  static constexpr int kTileFloats = kMostTileFloats;

  float* out;
  int64_t row_stride;
  int64_t numel;
  const void* inputs[kInputs];
  DType dtypes[kInputs];
  int32_t num_inputs;
  int32_t num_outputs;
  int32_t lanes;        // threads side by side in a tile, a multiple of the warp; a tile has kElements for each
  float coefs[kCoefs];  // [num_outputs, num_inputs]; compensated: pairs whose sum is the coefficient
};

using SmallSnapshotTable = SnapshotTable<32, 512, 4096>;
using LargeSnapshotTable = SnapshotTable<80, 7168, 10240>;

/// Consecutive elements that a thread handles: 16 bytes of an output.
inline constexpr int kElements = 4;
/// Outputs that a thread adds to at a time.
inline constexpr int kOutputs = 4;

/// `count` elements, followed by zeros.
template <typename T>
__device__ Floats<kElements> load_elements(const T* source, int count) {
  T elements[kElements];
  if (count == kElements && reinterpret_cast<uintptr_t>(source) % sizeof(elements) == 0) {
    using Bits = std::conditional_t<sizeof(elements) == sizeof(uint4), uint4, uint64_t>;
    const Bits bits = *reinterpret_cast<const Bits*>(source);
    memcpy(elements, &bits, sizeof(elements));
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) elements[i] = i < count ? source[i] : from_float<T>(0.0f);
  }
  Floats<kElements> values;
#pragma unroll
  for (int i = 0; i < kElements; ++i) values.v[i] = to_float(elements[i]);
  return values;
}

__device__ inline Floats<kElements> load_snapshot(const void* data, DType dtype, int64_t at, int count) {
  if (dtype == DType::kFloat32) return load_elements(static_cast<const float*>(data) + at, count);
  if (dtype == DType::kFloat16) return load_elements(static_cast<const __half*>(data) + at, count);
  return load_elements(static_cast<const __nv_bfloat16*>(data) + at, count);
}

__device__ inline void store_elements(float* target, const Floats<kElements>& values, int count) {
  if (count == kElements && bytes_past_16(target) == 0) {
    store(target, values);
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (i < count) target[i] = values.v[i];
    }
  }
}

/// kElements sums of products.
template <bool kCompensated>
struct Sums {
  Floats<kElements> value;

  __device__ void add(const float* coef, const Floats<kElements>& x) { value = value + x * *coef; }
  __device__ Floats<kElements> total() const { return value; }
};

/// What additions and products round away is summed beside them (Ogita, Rump and Oishi 2005, algorithm Dot2), and so is
/// what the coefficient's second part adds.
template <>
struct Sums<true> {
  Floats<kElements> value;
  Floats<kElements> error = {};

  __device__ void add(const float* coef, const Floats<kElements>& x) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float product = __fmul_rn(coef[0], x.v[i]);  // never fused with the addition, as `*` may be
      const float sum = value.v[i] + product;
      const float added = sum - value.v[i];
      const float lost = (value.v[i] - (sum - added)) + (product - added);
      error.v[i] += lost + fmaf(coef[1], x.v[i], fmaf(coef[0], x.v[i], -product));
      value.v[i] = sum;
    }
  }

  /// Where the sum is infinite, the error means nothing.
  __device__ Floats<kElements> total() const {
    return map([](float sum, float lost) { return sum - sum == 0.0f ? sum + lost : sum; }, value, error);
  }
};

template <bool kCompensated, class Table>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    accumulate_snapshots_tiles(const __grid_constant__ Table table) {
  constexpr int kParts = kCompensated ? 2 : 1;  // of a coefficient
  __shared__ uint4 storage[Table::kTileFloats / kElements];
  auto* const tile = reinterpret_cast<float*>(storage);  // [num_inputs, lanes, kElements]
  const int lanes = table.lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int row = static_cast<int>(threadIdx.x) / lanes;
  const int rows = kThreads / lanes;
  for (int64_t begin = blockIdx.x * int64_t{lanes} * kElements; begin < table.numel;
       begin += gridDim.x * int64_t{lanes} * kElements) {
    const int64_t at = begin + lane * kElements;
    const int64_t rest = table.numel - at;
    const int count = rest >= kElements ? kElements : rest > 0 ? static_cast<int>(rest) : 0;
    for (int n = row; n < table.num_inputs; n += rows) {
      store(tile + (n * lanes + lane) * kElements, load_snapshot(table.inputs[n], table.dtypes[n], at, count));
    }
    __syncthreads();
    for (int first = row; first < table.num_outputs; first += rows * kOutputs) {
      Sums<kCompensated> sums[kOutputs];
#pragma unroll
      for (int g = 0; g < kOutputs; ++g) {
        const int m = first + g * rows;
        sums[g].value = load_elements(table.out + m * table.row_stride + at, m < table.num_outputs ? count : 0);
      }
      for (int n = 0; n < table.num_inputs; ++n) {
        const auto x = load<kElements>(tile + (n * lanes + lane) * kElements);
#pragma unroll
        for (int g = 0; g < kOutputs; ++g) {
          const int m = first + g * rows;
          if (m < table.num_outputs) sums[g].add(table.coefs + (m * table.num_inputs + n) * kParts, x);
        }
      }
#pragma unroll
      for (int g = 0; g < kOutputs; ++g) {
        const int m = first + g * rows;
        store_elements(table.out + m * table.row_stride + at, sums[g].total(), m < table.num_outputs ? count : 0);
      }
    }
    __syncthreads();  // the next tile overwrites this one
  }
}

}  // namespace edm2::cuda
