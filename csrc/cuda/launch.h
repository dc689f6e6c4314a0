// Launching: grid size, dtype dispatch, and the one function through which every kernel starts. Host code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "edm2/common.h"
#include "edm2/traffic.h"

namespace edm2::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Whether all pointers (null counts) allow 16-byte access.
template <typename... Ts>
bool all_aligned(const Ts*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

constexpr int kMostPacksPerLane = 8;

/// Calls body(std::integral_constant<int, k>) with the smallest compiled k >= packs_per_lane.
template <typename Body>
cudaError_t dispatch_packs(int64_t packs_per_lane, Body body) {
  if (packs_per_lane <= 1) return body(std::integral_constant<int, 1>{});
  if (packs_per_lane <= 2) return body(std::integral_constant<int, 2>{});
  if (packs_per_lane <= 4) return body(std::integral_constant<int, 4>{});
  return body(std::integral_constant<int, kMostPacksPerLane>{});
}

/// Lanes that share `packs` 16-byte packs: as few as hold them one each, at most a warp.
inline int lanes_for(int64_t packs) {
  int lanes = 1;
  while (lanes < packs && lanes < 32) lanes *= 2;
  return lanes;
}

/// Bytes that all parameters of a kernel may take (CUDA 12.1 and later, sm_70 and later).
inline constexpr size_t kParameterLimit = 32764;

/// Shared memory that kernels with dynamic one may declare beside it.
inline constexpr int kMostStaticShared = 1024;

/// Dynamic shared memory that every GPU grants a block without being asked: 48 KB hold the static one too.
inline constexpr int kSharedWithoutAsking = 48 * 1024 - kMostStaticShared;

/// The most dynamic shared memory that a block may have on the current GPU.
inline cudaError_t shared_limit(int* bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  *bytes = 0;
  const cudaError_t answer = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes -= kMostStaticShared;
  return answer;
}

/// Starts `kernel` on so many blocks with `shared` bytes of dynamic shared memory. On the counting stream, counts it
/// and its traffic instead.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_blocks(int shared, void (*kernel)(Parameters...), int64_t blocks, dim3 threads, cudaStream_t stream,
                          Traffic traffic, const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= kParameterLimit);
  if (blocks <= 0) return cudaSuccess;
  if (stream == counting_stream()) {
    ++tally.launches;
    tally.read += traffic.read;
    tally.written += traffic.written;
    return cudaSuccess;
  }
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared > kSharedWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

/// The same on as many blocks as `work` needs, at most a few waves: the kernel strides over the grid.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_with_shared(int shared, void (*kernel)(Parameters...), int64_t work, dim3 threads,
                               cudaStream_t stream, Traffic traffic, const Arguments&... arguments) {
  constexpr int64_t kBlocksPerMultiprocessor = 32;
  int device = 0;
  int multiprocessors = 1;
  if (stream != counting_stream()) {
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
  }
  const int64_t blocks = std::min(work, multiprocessors * kBlocksPerMultiprocessor);
  return launch_blocks(shared, kernel, blocks, threads, stream, traffic, arguments...);
}

/// The same without dynamic shared memory.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t work, dim3 threads, cudaStream_t stream, Traffic traffic,
                   const Arguments&... arguments) {
  return launch_with_shared(0, kernel, work, threads, stream, traffic, arguments...);
}

template <typename T>
struct Storage {
  using type = T;
};

/// Calls body(Storage<T>) for the dtypes that have kernels; else cudaErrorInvalidValue.
template <typename Body>
cudaError_t dispatch_storage(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Storage<float>{});
    case DType::kFloat16:
      return body(Storage<__half>{});
    case DType::kBFloat16:
      return body(Storage<__nv_bfloat16>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace edm2::cuda
