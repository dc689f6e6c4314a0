// What the kernels share: storage types, 16-byte access with scalar edges, reductions over lanes of a warp. Device code
// only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "edm2/math.h"

namespace edm2::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarpSize = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

/// Second argument of __launch_bounds__ for a kernel whose threads hold so many packs: 80, 128 or 255 registers. Left
/// to itself, ptxas spills a few registers here and there to fit in one more block.
template <int kHeldPacks = 0>
inline constexpr int kResidentBlocks = kHeldPacks <= 6    ? 3
                                       : kHeldPacks <= 12 ? 2
                                                          : 1;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_float(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

/// Elements in one 16-byte access.
template <typename T>
inline constexpr int kPack = static_cast<int>(16 / sizeof(T));

/// What one access moves: 16 bytes (kPack<T> elements) or a single element.
template <typename T, int N>
struct Packed {
  static_assert(N == kPack<T> || N == 1);
  std::conditional_t<N == 1, T, uint4> bits;

  __device__ static Packed load(const T* source) { return {*reinterpret_cast<const decltype(bits)*>(source)}; }
};

/// N values in fp32 registers, with element-wise arithmetic.
template <int N>
struct Floats {
  float v[N];
};

template <int N, typename F>
__device__ Floats<N> map(F f, Floats<N> a) {
#pragma unroll
  for (int i = 0; i < N; ++i) a.v[i] = f(a.v[i]);
  return a;
}

template <int N, typename F>
__device__ Floats<N> map(F f, Floats<N> a, const Floats<N>& b) {
#pragma unroll
  for (int i = 0; i < N; ++i) a.v[i] = f(a.v[i], b.v[i]);
  return a;
}

template <int N>
__device__ Floats<N> operator*(const Floats<N>& a, float b) {
  return map([b](float v) { return v * b; }, a);
}

template <int N>
__device__ Floats<N> operator*(const Floats<N>& a, const Floats<N>& b) {
  return map([](float v, float w) { return v * w; }, a, b);
}

template <int N>
__device__ Floats<N> operator+(const Floats<N>& a, const Floats<N>& b) {
  return map([](float v, float w) { return v + w; }, a, b);
}

template <int N>
__device__ Floats<N> operator-(const Floats<N>& a, const Floats<N>& b) {
  return map([](float v, float w) { return v - w; }, a, b);
}

template <int N>
__device__ float sum(const Floats<N>& a) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) total += a.v[i];
  return total;
}

template <int N>
__device__ Floats<N> mp_silu(const Floats<N>& z) {
  return map([](float v) { return math::mp_silu(v); }, z);
}

template <int N>
__device__ Floats<N> mp_silu_grad(const Floats<N>& z) {
  return map([](float v) { return math::mp_silu_grad(v); }, z);
}

template <typename T, int N>
__device__ Floats<N> unpack(const Packed<T, N>& packed) {
  T elements[N];
  memcpy(elements, &packed.bits, sizeof(elements));
  Floats<N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out.v[i] = to_float(elements[i]);
  return out;
}

template <int N, typename T>
__device__ Floats<N> load(const T* source) {
  return unpack(Packed<T, N>::load(source));
}

template <int N, typename T>
__device__ void store(T* target, const Floats<N>& values) {
  T elements[N];
#pragma unroll
  for (int i = 0; i < N; ++i) elements[i] = from_float<T>(values.v[i]);
  decltype(Packed<T, N>::bits) bits;
  memcpy(&bits, elements, sizeof(bits));
  *reinterpret_cast<decltype(bits)*>(target) = bits;
}

__device__ inline int bytes_past_16(const void* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % 16);
}

/// Elements before the first 16-byte boundary, or all `count` where the pointers do not reach one together.
template <typename T, typename... Ts>
__device__ int64_t elements_to_boundary(int64_t count, const T* first, const Ts*... others) {
  const int past = bytes_past_16(first);
  if (((bytes_past_16(others) != past) || ...)) return count;
  const int64_t head = (16 - past) % 16 / static_cast<int>(sizeof(T));
  return head < count ? head : count;
}

template <int N>
using Width = std::integral_constant<int, N>;

/// Calls body(Width<N>, offset) over [0, count): scalars up to the 16-byte boundary at `head`, packs, scalars to the
/// end. The caller is worker `first` of `step`.
template <typename T, typename Body>
__device__ void for_each_pack(int64_t count, int64_t head, int64_t first, int64_t step, Body body) {
  const int64_t packs = (count - head) / kPack<T>;
#pragma unroll 1
  for (int64_t i = first; i < packs; i += step) body(Width<kPack<T>>{}, head + i * kPack<T>);
#pragma unroll 1
  for (int64_t i = first; i < head; i += step) body(Width<1>{}, i);
#pragma unroll 1
  for (int64_t i = head + packs * kPack<T> + first; i < count; i += step) body(Width<1>{}, i);
}

/// Shares items among groups of `lanes` neighbouring lanes, a power of two up to a warp. A warp's groups start from the
/// same `first`, so that a loop over it keeps the warp together; a group's own item is then first + within_warp, which
/// may be beyond the last.
struct LaneGroups {
  int lane;
  int within_warp;
  int64_t first;
  int64_t step;

  __device__ explicit LaneGroups(int lanes)
      : lane(static_cast<int>(threadIdx.x) % lanes),
        within_warp(static_cast<int>(threadIdx.x) % kWarpSize / lanes),
        first((blockIdx.x * int64_t{kThreads} + threadIdx.x) / lanes - within_warp),
        step(gridDim.x * int64_t{kThreads} / lanes) {}
};

/// Sum over groups of `lanes` neighbouring lanes; every lane of the group gets it. The whole warp must call.
__device__ inline float sum_over_lanes(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kWholeWarp, value, offset);
  return value;
}

}  // namespace edm2::cuda
