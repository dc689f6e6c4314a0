// Kernels over the rows of many tensors at once: a table, passed as the kernel's parameter, lists the tensors; blocks
// take their rows in turn. A long row is shared out among the block's threads, short rows go one to each warp. What a
// row needs again after a sum over it is held in shared memory, or, if it is too long for that, read again.
//
// Types are told at run time: loads of 16 bits and of 32 are issued from the same place, and one kernel serves all.
#pragma once

#include "device.cuh"
#include "edm2/common.h"

namespace edm2::cuda {

inline constexpr int kWarps = kThreads / kWarpSize;

/// Elements in one access of four floats, or of four 16-bit elements beside them.
inline constexpr int kQuad = 4;

/// Rows up to this size take a warp.
inline constexpr int kShortRow = 512;

__device__ inline const void* advanced(const void* pointer, DType dtype, int64_t elements) {
  return static_cast<const char*>(pointer) + elements * (dtype == DType::kFloat32 ? 4 : 2);
}

__device__ inline void* advanced(void* pointer, DType dtype, int64_t elements) {
  return static_cast<char*>(pointer) + elements * (dtype == DType::kFloat32 ? 4 : 2);
}

/// N elements (kQuad or 1) as they lie in memory.
template <int N>
struct Raw {
  static_assert(N == kQuad || N == 1);
  uint4 bits;

  __device__ static Raw load(const void* source, DType dtype, int64_t i) {
    Raw raw;
    if (dtype == DType::kFloat32) {
      if constexpr (N == 1) {
        raw.bits.x = static_cast<const unsigned*>(source)[i];
      } else {
        raw.bits = *reinterpret_cast<const uint4*>(static_cast<const float*>(source) + i);
      }
    } else if constexpr (N == 1) {
      raw.bits.x = static_cast<const unsigned short*>(source)[i];
    } else {
      const uint2 half = *reinterpret_cast<const uint2*>(static_cast<const unsigned short*>(source) + i);
      raw.bits.x = half.x;
      raw.bits.y = half.y;
    }
    return raw;
  }

  template <typename T>
  __device__ Floats<N> as() const {
    T elements[N];
    memcpy(elements, &bits, sizeof(elements));
    Floats<N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.v[i] = to_float(elements[i]);
    return out;
  }

  __device__ Floats<N> floats(DType dtype) const {
    if (dtype == DType::kFloat32) return as<float>();
    return dtype == DType::kFloat16 ? as<__half>() : as<__nv_bfloat16>();
  }
};

/// Of two tensors.
template <int N>
struct RawPair {
  Raw<N> first;
  Raw<N> second;
};

/// The same for values to be stored: floats as they are, 16-bit elements rounded.
template <typename T, int N>
__device__ void store_rounded(void* target, int64_t i, const Floats<N>& values) {
  T elements[N];
#pragma unroll
  for (int j = 0; j < N; ++j) elements[j] = from_float<T>(values.v[j]);
  if constexpr (N == 1) {
    static_cast<T*>(target)[i] = elements[0];
  } else {
    std::conditional_t<sizeof(T) == 4, uint4, uint2> bits;
    memcpy(&bits, elements, sizeof(bits));
    *reinterpret_cast<decltype(bits)*>(static_cast<T*>(target) + i) = bits;
  }
}

template <int N>
__device__ void store_as(void* target, DType dtype, int64_t i, const Floats<N>& values) {
  if (dtype == DType::kFloat32) {
    store_rounded<float>(target, i, values);
  } else if (dtype == DType::kFloat16) {
    store_rounded<__half>(target, i, values);
  } else {
    store_rounded<__nv_bfloat16>(target, i, values);
  }
}

/// The threads that share a row: a warp if it is short, else the block. All of a block's teams are of one kind.
struct Team {
  int rank;   // of the thread in its team
  int size;   // threads of the team
  int index;  // of the team in its block

  __device__ explicit Team(int row_size) : rank(static_cast<int>(threadIdx.x)), size(kThreads), index(0) {
    if (row_size > kShortRow) return;
    rank %= kWarpSize;
    size = kWarpSize;
    index = static_cast<int>(threadIdx.x) / kWarpSize;
  }

  __device__ static int teams(int row_size) { return row_size > kShortRow ? 1 : kWarps; }

  /// Sums over the team, which every thread of it gets; they come in a fixed order. What threads of the team wrote
  /// before, all of them see after. At most one call for a row with each N.
  template <int N>
  __device__ Floats<N> sum(Floats<N> values) const {
    __shared__ Floats<N> partial[kWarps];
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      values = map([offset](float v) { return v + __shfl_xor_sync(kWholeWarp, v, offset); }, values);
    }
    if (size == kWarpSize) {
      sync();
      return values;
    }
    if (rank % kWarpSize == 0) partial[rank / kWarpSize] = values;
    __syncthreads();
    values = partial[0];
    for (int warp = 1; warp < kWarps; ++warp) values = values + partial[warp];
    return values;
  }

  /// What threads of the team wrote before, all of them see after.
  __device__ void sync() const {
    if (size == kWarpSize) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  /// Calls use(Width<N>, i, load(Width<N>, i)) over the thread's share of [0, count), in quads or single elements;
  /// kBatch loads are on their way at a time.
  template <int kBatch, typename Load, typename Use>
  __device__ void for_each(int count, bool quads, Load load, Use use) const {
    if (quads) {
      for_each_of<kBatch>(Width<kQuad>{}, count, load, use);
    } else {
      for_each_of<kBatch>(Width<1>{}, count, load, use);
    }
  }

 private:
  template <int kBatch, int N, typename Load, typename Use>
  __device__ void for_each_of(Width<N> width, int count, Load load, Use use) const {
    const int step = size * N;
#pragma unroll 1
    for (int first = rank * N; first < count; first += kBatch * step) {
      decltype(load(width, 0)) loaded[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (first + k * step < count) loaded[k] = load(width, first + k * step);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (first + k * step < count) use(width, first + k * step, loaded[k]);
      }
    }
  }
};

/// The last of `count` ascending numbers that is not above `value`, given that the first is not.
template <typename Number>
__device__ int last_not_above(int value, int count, Number number) {
  int low = 0;
  int high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (number(middle) <= value) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/// A team's part of the dynamic shared memory, `floats` for each element of its row; null if that is too small.
__device__ inline float* row_memory(const Team& team, int row_size, int floats, int capacity) {
  alignas(16) extern __shared__ unsigned char dynamic_shared[];
  const int64_t needed = int64_t{floats} * (row_size > kShortRow ? row_size : kShortRow * kWarps);
  if (needed > capacity) return nullptr;
  return reinterpret_cast<float*>(dynamic_shared) + team.index * floats * kShortRow;
}

/// rms of a row and what divides it, eps + rms (spec 2.1).
struct RowNorm {
  float rms;
  float s;

  __device__ RowNorm(float squares, int row_size, float eps)
      : rms(sqrtf(squares / static_cast<float>(row_size))), s(eps + rms) {}
};

/// Sum of `count` values by a warp in a fixed order; every lane gets it.
__device__ inline double sum_of_column(const float* values, int count, int lane) {
  double total = 0;
  for (int i = lane; i < count; i += kWarpSize) total += static_cast<double>(values[i]);
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(kWholeWarp, total, offset);
  return total;
}

/// A row to be written in another layout than that in which it is read: transposed, [size / inner, inner].
struct Transposed {
  void* out;
  DType dtype;
  int size;
  int inner;
  bool quads;  // of four elements, in out

  /// out = value(index in the row as it is read).
  template <typename Value>
  __device__ void write(const Team& team, Value value) const {
    const int outer = size / inner;
    team.for_each<1>(
        size, quads, [](auto, int) { return 0; },
        [&](auto width, int i, int) {
          const int source = i % outer * inner + i / outer;
          Floats<width.value> values;
#pragma unroll
          for (int k = 0; k < width.value; ++k) values.v[k] = value(source + k * inner);
          store_as(out, dtype, i, values);
        });
  }
};

}  // namespace edm2::cuda
