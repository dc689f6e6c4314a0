// Instructions of sm_80 and later that CUDA C++ has no name for: asynchronous copies to shared memory, and the loads
// and products of tensor cores. The emulation has its own definitions of the same functions. Device code only.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device.cuh"

#if !defined(__CUDACC__)
#include "emulated_tensor_core.h"
#else

namespace edm2::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Starts to copy 16 bytes to shared memory, or to fill them with zeros, without reading the source, unless `wanted`.
__device__ inline void copy_async(void* shared, const void* source, bool wanted) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(source),
               "r"(wanted ? 16 : 0));
}

/// Ends a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }

/// Until at most so many of this thread's latest groups are still being copied.
template <int Groups>
__device__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements from shared memory: lane 8 i + j says where row j of matrix i is. Lane l gets
/// elements 2 (l % 4) and the next of row l / 4 of each, or, Transposed, of column l / 4.
template <bool Transposed>
__device__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  const uint32_t address = shared_address(row);
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address));
  }
}

/// sums += a b with a 16 x 16, b 16 x 8. Of a, lane l holds the four 8 x 8 matrices (rows 0, columns 0), (8, 0), (0, 8)
/// and (8, 8) as load_matrices gives them; of b the two (0, 0) and (8, 0), Transposed; of the sums elements 2 (l % 4)
/// and the next of rows l / 4 and l / 4 + 8.
template <typename T>
__device__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace edm2::cuda

#endif
