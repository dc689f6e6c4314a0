// Tables of row kernels, filled on the host: what the launchers of rows.cuh's users share.
#pragma once

#include "launch.h"
#include "rows.cuh"

namespace edm2::cuda {

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

/// Whether a tensor can be taken four elements at a time at this address.
inline bool quad_aligned(const void* pointer, DType dtype) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(kQuad * size_of(dtype)) == 0;
}

/// Items that rows make: the rows themselves, or as many short ones at a time as a block has warps.
inline int64_t items_of(int64_t rows, int64_t row_size) { return row_size > kShortRow ? rows : ceil_div(rows, kWarps); }

/// Dynamic shared memory for rows of up to `longest` elements, `floats` each: what they need, or as much as there is.
inline cudaError_t shared_for_rows(int64_t longest, int floats, cudaStream_t stream, int* bytes) {
  *bytes = 0;
  if (stream == counting_stream()) return cudaSuccess;
  int most = 0;
  const cudaError_t error = shared_limit(&most);
  const int64_t needed = int64_t{floats} * 4 * std::max<int64_t>(longest, kShortRow * kWarps);
  *bytes = static_cast<int>(std::min<int64_t>(needed, most));
  return error;
}

/// Numbers a table holds in 32 bits.
inline bool fits_table(int64_t rows, int64_t row_size, int64_t items_before) {
  return row_size <= INT32_MAX && items_before + rows <= INT32_MAX;
}

}  // namespace edm2::cuda
