// MP-Sum (Eq. 88), clamped to [-clip, clip] (nothing is if clip is infinite), and its backward.
#pragma once

#include "device.cuh"

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

/// Without clipping: a and b do not matter.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mp_sum_backward_elements(const T* __restrict__ grad_y, T* __restrict__ grad_a, T* __restrict__ grad_b,
                             int64_t numel, float weight_a, float weight_b) {
  const int64_t head = elements_to_boundary(numel, grad_y, grad_a, grad_b);
  for_each_pack<T>(numel, head, blockIdx.x * int64_t{kThreads} + threadIdx.x, gridDim.x * int64_t{kThreads},
                   [&](auto width, int64_t at) {
                     const auto grad = load<width>(grad_y + at);
                     store(grad_a + at, grad * weight_a);
                     store(grad_b + at, grad * weight_b);
                   });
}

/// The gradient passes where the sum lies within the bounds, these included (spec 2.13).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mp_sum_clipped_backward_elements(const T* __restrict__ grad_y, const T* __restrict__ a, const T* __restrict__ b,
                                     T* __restrict__ grad_a, T* __restrict__ grad_b, int64_t numel, float weight_a,
                                     float weight_b, float clip) {
  const int64_t head = elements_to_boundary(numel, grad_y, a, b, grad_a, grad_b);
  for_each_pack<T>(numel, head, blockIdx.x * int64_t{kThreads} + threadIdx.x, gridDim.x * int64_t{kThreads},
                   [&](auto width, int64_t at) {
                     const auto sum = load<width>(a + at) * weight_a + load<width>(b + at) * weight_b;
                     const auto grad = map([clip](float g, float y) { return y >= -clip && y <= clip ? g : 0.0f; },
                                           load<width>(grad_y + at), sum);
                     store(grad_a + at, grad * weight_a);
                     store(grad_b + at, grad * weight_b);
                   });
}

}  // namespace edm2::cuda
