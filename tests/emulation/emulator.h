// Runs CUDA kernels on the CPU, one thread block at a time (or a few interleaved), each CUDA thread a fiber. It is
// there to find faults: it looks for barriers that not all threads reach, for shuffles whose mask names lanes that are
// gone, and for memory that is read before it is written (shared memory starts every block as NaN); the order of
// threads and blocks can be changed, so that a missing barrier shows.
//
// A kernel can be emulated if it is plain CUDA C++: no inline PTX but that of csrc/cuda/tensor_core.cuh, which has a
// twin here, no cooperative groups, no cub. Dynamic shared memory
// is declared as `extern __shared__ unsigned char dynamic_shared[];`. What include/cuda_runtime.h does not have yet is
// added there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the running thread.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace emulation {

inline constexpr int kWarpSize = 32;
inline constexpr size_t kDynamicSharedLimit = 47 * 1024;  // granted without being asked: 48 KB with what is declared
inline constexpr size_t kDynamicSharedMost = 99 * 1024;   // on request: sm_86, 89 and 120

enum class ThreadOrder { kForward, kReverse, kRandom };
enum class BlockOrder { kForward, kReverse, kInterleaved };

struct Options {
  ThreadOrder threads = ThreadOrder::kForward;
  BlockOrder blocks = BlockOrder::kForward;
  uint64_t seed = 0;
  int multiprocessors = 2;
};

Options& options();

/// The running thread's place in its warp.
int lane_index();

/// __syncthreads: returns when all threads of the block have called it from the same place. All of them must.
void block_barrier(std::source_location where);

/// What the lanes of a warp named in `mask` do together. When the last has arrived, `combine` is called once with the
/// mask and each lane's operand (null for others).
void warp_collective(unsigned mask, void* operand, void (*combine)(unsigned mask, void** operands),
                     std::source_location where);

/// cp.async: the running thread starts to copy to shared memory; null: zeros. Nobody may read the target until the
/// thread has waited for the copy, so until then it holds NaN.
void start_copy(void* target, const void* source, size_t bytes);
void end_copy_group();
/// Makes the copies of all but the latest so many groups.
void await_copy_groups(unsigned in_flight);

enum class Outcome { kDone, kRefused, kFailed };

/// Runs `body` once per thread of the grid. Refused: a GPU would not start it. Failed: a fault was found;
/// emulation_message() says which, and what the grid had left to do is not done. `granted`: bytes of dynamic shared
/// memory that the kernel may use.
Outcome run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, size_t granted, const std::function<void()>& body);

}  // namespace emulation

namespace edm2::cuda {
/// Dynamic shared memory: kernels declare `extern __shared__ unsigned char dynamic_shared[];`.
alignas(128) extern thread_local unsigned char dynamic_shared[emulation::kDynamicSharedMost];
}  // namespace edm2::cuda

// For the tests, by ctypes.
extern "C" {
void emulation_configure(int thread_order, int block_order, uint64_t seed, int multiprocessors);
/// What was wrong with the last launch that was refused or failed.
const char* emulation_message();
/// Kernels launched so far.
int64_t emulation_launches();
/// Bytes of dynamic shared memory that the last launch had.
int64_t emulation_dynamic_shared();
}
