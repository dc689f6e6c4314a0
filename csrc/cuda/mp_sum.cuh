// MP-Sum (Eq. 88), clamped to [-clip, clip] (nothing is if clip is infinite), and its backward. The mask, and the
// reason why it is one: edm2/mp_sum.h.
#pragma once

#include "device.cuh"
#include "edm2/mp_sum.h"

namespace edm2::cuda {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mp_sum_elements(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y, int64_t numel, float weight_a,
                    float weight_b, float clip) {
  const int64_t head = elements_to_boundary(numel, a, b, y);
  for_each_pack<T>(numel, head, blockIdx.x * int64_t{kThreads} + threadIdx.x, gridDim.x * int64_t{kThreads},
                   [&](auto width, int64_t at) {
                     const auto sum = load<width>(a + at) * weight_a + load<width>(b + at) * weight_b;
                     store(y + at, map([clip](float v) { return math::clamp(v, clip); }, sum));
                   });
}

/// Calls body(group) for every group of elements that share a byte of the mask, one thread each.
template <typename Body>
__device__ void for_each_group(int64_t numel, Body body) {
  const int64_t groups = (numel + kMaskedTogether - 1) / kMaskedTogether;
  const int64_t step = gridDim.x * int64_t{kThreads};
#pragma unroll 1
  for (int64_t group = blockIdx.x * int64_t{kThreads} + threadIdx.x; group < groups; group += step) body(group);
}

/// Calls body(Width<N>, offset, bit of the first) over a group: packs where `aligned` allows them and the group is
/// whole, else single elements.
template <typename T, typename Body>
__device__ void for_each_in_group(int64_t group, int64_t numel, bool aligned, Body body) {
  const int64_t first = group * kMaskedTogether;
  if (aligned && first + kMaskedTogether <= numel) {
#pragma unroll
    for (int bit = 0; bit < kMaskedTogether; bit += kPack<T>) body(Width<kPack<T>>{}, first + bit, bit);
  } else {
    const int size = static_cast<int>(numel - first < kMaskedTogether ? numel - first : kMaskedTogether);
#pragma unroll 1
    for (int bit = 0; bit < size; ++bit) body(Width<1>{}, first + bit, bit);
  }
}

/// The bits of N neighbouring sums, the first in the lowest.
template <int N>
__device__ unsigned within_bounds(const Floats<N>& sums, float clip) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) bits |= (sums.v[i] >= -clip && sums.v[i] <= clip ? 1u : 0u) << i;
  return bits;
}

/// The clamped sum with its mask. aligned: all tensors start at a 16-byte boundary.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mp_sum_clipped_elements(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y,
                            uint8_t* __restrict__ mask, int64_t numel, bool aligned, float weight_a, float weight_b,
                            float clip) {
  for_each_group(numel, [&](int64_t group) {
    unsigned bits = 0;
    for_each_in_group<T>(group, numel, aligned, [&](auto width, int64_t at, int bit) {
      const auto sum = load<width>(a + at) * weight_a + load<width>(b + at) * weight_b;
      store(y + at, map([clip](float v) { return math::clamp(v, clip); }, sum));
      bits |= within_bounds(sum, clip) << bit;
    });
    mask[group] = static_cast<uint8_t>(bits);
  });
}

/// The gradient of y: that of its one user, or the sum over two.
template <int N, bool kTwoUsers, typename T>
__device__ Floats<N> gradient_of_sum(const T* grad_y, const T* more_grad_y, int64_t at) {
  if constexpr (kTwoUsers) return load<N>(grad_y + at) + load<N>(more_grad_y + at);
  return load<N>(grad_y + at);
}

/// Without clipping.
template <typename T, bool kTwoUsers>
__global__ void __launch_bounds__(kThreads)
    mp_sum_backward_elements(const T* __restrict__ grad_y, const T* __restrict__ more_grad_y, T* __restrict__ grad_a,
                             T* __restrict__ grad_b, int64_t numel, float weight_a, float weight_b) {
  const int64_t head = elements_to_boundary(numel, grad_y, kTwoUsers ? more_grad_y : grad_y, grad_a, grad_b);
  for_each_pack<T>(numel, head, blockIdx.x * int64_t{kThreads} + threadIdx.x, gridDim.x * int64_t{kThreads},
                   [&](auto width, int64_t at) {
                     const auto grad = gradient_of_sum<width, kTwoUsers>(grad_y, more_grad_y, at);
                     store(grad_a + at, grad * weight_a);
                     store(grad_b + at, grad * weight_b);
                   });
}

/// Where the mask lets it pass. aligned: all tensors start at a 16-byte boundary.
template <typename T, bool kTwoUsers>
__global__ void __launch_bounds__(kThreads)
    mp_sum_clipped_backward_elements(const T* __restrict__ grad_y, const T* __restrict__ more_grad_y,
                                     const uint8_t* __restrict__ mask, T* __restrict__ grad_a, T* __restrict__ grad_b,
                                     int64_t numel, bool aligned, float weight_a, float weight_b) {
  for_each_group(numel, [&](int64_t group) {
    const unsigned bits = mask[group];
    for_each_in_group<T>(group, numel, aligned, [&](auto width, int64_t at, int bit) {
      auto grad = gradient_of_sum<width, kTwoUsers>(grad_y, more_grad_y, at);
#pragma unroll
      for (int i = 0; i < decltype(width)::value; ++i) grad.v[i] = bits >> (bit + i) & 1u ? grad.v[i] : 0.0f;
      store(grad_a + at, grad * weight_a);
      store(grad_b + at, grad * weight_b);
    });
  });
}

}  // namespace edm2::cuda
