// The part of CUDA C++ that the kernels use, for g++: this folder stands in for the toolkit's include folder, so that
// csrc/cuda/*.cu compile unchanged. Threads are fibers (emulator.h). Everything of a module that is thread_local is
// shared memory.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <source_location>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ thread_local

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

/// A product that is rounded, never fused with an addition. (g++ fuses none here: it compiles for CPUs without FMA.)
inline float __fmul_rn(float a, float b) { return a * b; }

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long before = *address;  // one fiber runs at a time
  *address += value;
  return before;
}

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  emulation::block_barrier(where);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location where = std::source_location::current()) {
  emulation::warp_collective(mask, nullptr, [](unsigned, void**) {}, where);
}

namespace emulation {

template <typename T>
struct Shuffled {
  T value;
  int source;  // lane to read from
  T result;
};

/// Every lane of `mask` gets the value of its source lane; from a lane outside the mask it gets garbage, on a GPU too.
template <typename T>
T shuffle(unsigned mask, T value, int source, std::source_location where) {
  Shuffled<T> own{value, source, value};
  warp_collective(
      mask, &own,
      [](unsigned lanes, void** operands) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
          if ((lanes >> lane & 1) == 0) continue;
          auto& reader = *static_cast<Shuffled<T>*>(operands[lane]);
          if ((lanes >> reader.source & 1) == 0) {
            memset(&reader.result, 0xff, sizeof(T));
          } else {
            reader.result = static_cast<Shuffled<T>*>(operands[reader.source])->value;
          }
        }
      },
      where);
  return own.result;
}

}  // namespace emulation

// A source beyond the lane's segment of `width` lanes means the lane itself, except for __shfl_sync, which wraps.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              std::source_location where = std::source_location::current()) {
  const int lane = emulation::lane_index();
  return emulation::shuffle(mask, value, lane / width * width + (source & (width - 1)), where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  std::source_location where = std::source_location::current()) {
  const int lane = emulation::lane_index();
  const int source = lane ^ lane_mask;
  return emulation::shuffle(mask, value, source < (lane / width + 1) * width ? source : lane, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   std::source_location where = std::source_location::current()) {
  const int lane = emulation::lane_index();
  const int source = lane + static_cast<int>(delta);
  return emulation::shuffle(mask, value, source < (lane / width + 1) * width ? source : lane, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 std::source_location where = std::source_location::current()) {
  const int lane = emulation::lane_index();
  const int source = lane - static_cast<int>(delta);
  return emulation::shuffle(mask, value, source >= lane / width * width ? source : lane, where);
}

// ---- the runtime API ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::options().multiprocessors
                                                       : static_cast<int>(emulation::kDynamicSharedMost);
  return cudaSuccess;
}

namespace emulation {
/// Dynamic shared memory that a kernel was granted.
template <typename... Parameters>
size_t& granted(void (*kernel)(Parameters...)) {
  static std::map<void (*)(Parameters...), size_t> bytes;
  return bytes.try_emplace(kernel, kDynamicSharedLimit).first->second;
}
}  // namespace emulation

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  if (value > static_cast<int>(emulation::kDynamicSharedMost)) return cudaErrorInvalidValue;
  emulation::granted(kernel) = static_cast<size_t>(value);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  switch (emulation::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, emulation::granted(kernel),
                         [&] { kernel(arguments...); })) {
    case emulation::Outcome::kDone:
      return cudaSuccess;
    case emulation::Outcome::kRefused:
      return cudaErrorInvalidConfiguration;
    default:
      return cudaErrorLaunchFailure;
  }
}
