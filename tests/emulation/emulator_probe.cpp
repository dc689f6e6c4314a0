// Kernels that use what the emulator offers, well and badly, for the tests of the emulator itself.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace edm2::cuda {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  cudaLaunchConfig_t config;
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

__global__ void write_indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += static_cast<int>(1000 * block + thread);
}

/// Reverses each block's part of the data through shared memory.
template <bool kBarrier>
__global__ void reverse(float* data) {
  __shared__ float held[64];
  held[threadIdx.x] = data[blockIdx.x * 64 + threadIdx.x];
  if (kBarrier) __syncthreads();
  data[blockIdx.x * 64 + threadIdx.x] = held[63 - threadIdx.x];
}

__global__ void reverse_dynamic(float* data, int size) {
  extern __shared__ unsigned char dynamic_shared[];
  auto* held = reinterpret_cast<float*>(dynamic_shared);
  for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) held[i] = data[i];
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) data[i] = held[size - 1 - i];
}

/// Blocks exchange values through global memory, which a GPU does not order: shows that blocks interleave.
__global__ void read_other_block(float* data) {
  data[blockIdx.x] = 1.0f;
  __syncthreads();
  data[gridDim.x + blockIdx.x] = data[(blockIdx.x + 1) % gridDim.x];
}

__global__ void read_unwritten_shared(float* out) {
  __shared__ float held[32];
  out[threadIdx.x] = held[threadIdx.x];
  held[threadIdx.x] = 1.0f;
}

/// In registers, from 0 to `last` of four.
__global__ void fill_array(float* out, int last) {
  float values[4];
  for (int i = 0; i <= last; ++i) values[i] = static_cast<float>(i + static_cast<int>(threadIdx.x));
  out[threadIdx.x] = values[last];
}

__global__ void barrier_in_branch(int) {
  if (threadIdx.x < 7) __syncthreads();
}

__global__ void two_barriers(int) {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_after_exit(int) {
  if (threadIdx.x == 3) return;
  __syncthreads();
}

__global__ void shuffle_after_exit(float* out) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void shuffle_outside_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }

__global__ void shuffle_in_partial_warp(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1); }

__global__ void barrier_against_shuffle(float* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  }
}

__global__ void two_shuffles(float* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 2.0f, 1);
  }
}

/// The four shuffles, each over segments of `width` lanes; out [4, 32].
__global__ void shuffles(int* out, int argument, int width) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_sync(0xffffffffu, lane, argument, width);
  out[32 + lane] = __shfl_xor_sync(0xffffffffu, lane, argument, width);
  out[64 + lane] = __shfl_down_sync(0xffffffffu, lane, static_cast<unsigned>(argument), width);
  out[96 + lane] = __shfl_up_sync(0xffffffffu, lane, static_cast<unsigned>(argument), width);
}

/// Odd and even lanes each among themselves; a source outside the mask gives garbage.
__global__ void masked_shuffles(float* out) {
  const unsigned mask = threadIdx.x % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  const auto own = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_xor_sync(mask, own, 2);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(mask, own, 1);
  }
  __syncwarp();
}

}  // namespace edm2::cuda

using namespace edm2::cuda;

extern "C" {
int probe_indices(int* out) { return launch(write_indices, dim3(3, 2, 2), dim3(5, 3, 2), 0, out); }
int probe_reverse(float* data, int64_t blocks, bool barrier) {
  return launch(barrier ? reverse<true> : reverse<false>, static_cast<unsigned>(blocks), 64, 0, data);
}
int probe_reverse_dynamic(float* data, int64_t size, int64_t bytes) {
  return launch(reverse_dynamic, 1, 32, static_cast<size_t>(bytes), data, static_cast<int>(size));
}
int probe_read_other_block(float* data, int64_t blocks) {
  return launch(read_other_block, static_cast<unsigned>(blocks), 32, 0, data);
}
int probe_read_unwritten_shared(float* out) { return launch(read_unwritten_shared, 2, 32, 0, out); }
int probe_array(float* out, int64_t last) { return launch(fill_array, 1, 32, 0, out, static_cast<int>(last)); }
int probe_barrier_in_branch() { return launch(barrier_in_branch, 1, 64, 0, 0); }
int probe_two_barriers() { return launch(two_barriers, 1, 64, 0, 0); }
int probe_barrier_after_exit() { return launch(barrier_after_exit, 1, 64, 0, 0); }
int probe_shuffle_after_exit(float* out) { return launch(shuffle_after_exit, 1, 64, 0, out); }
int probe_shuffle_outside_mask(float* out) { return launch(shuffle_outside_mask, 1, 32, 0, out); }
int probe_shuffle_in_partial_warp(float* out) { return launch(shuffle_in_partial_warp, 1, 40, 0, out); }
int probe_barrier_against_shuffle(float* out) { return launch(barrier_against_shuffle, 1, 32, 0, out); }
int probe_two_shuffles(float* out) { return launch(two_shuffles, 1, 32, 0, out); }
int probe_shuffles(int* out, int64_t argument, int64_t width) {
  return launch(shuffles, 1, 32, 0, out, static_cast<int>(argument), static_cast<int>(width));
}
int probe_masked_shuffles(float* out) { return launch(masked_shuffles, 1, 32, 0, out); }
int probe_launch(int64_t grid_x, int64_t grid_y, int64_t block) {
  return launch(barrier_in_branch, dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)),
                static_cast<unsigned>(block), 0, 0);
}

void float_to_half(const float* in, __half* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = __float2half_rn(in[i]);
}
void half_to_float(const __half* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = __half2float(in[i]);
}
void float_to_bfloat16(const float* in, __nv_bfloat16* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = __float2bfloat16_rn(in[i]);
}
void bfloat16_to_float(const __nv_bfloat16* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = __bfloat162float(in[i]);
}
}
