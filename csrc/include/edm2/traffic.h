// What kernels move, and counting launches instead of starting them: tensors of the meta device take the path of CUDA
// tensors up to the launch itself.
#pragma once

#include <atomic>
#include <cstdint>

struct CUstream_st;

namespace edm2::cuda {

/// Bytes that a launch must move, each counted once.
struct Traffic {
  int64_t read;
  int64_t written;
};

/// The launches that were counted.
struct Tally {
  std::atomic<int64_t> launches = 0;
  std::atomic<int64_t> read = 0;
  std::atomic<int64_t> written = 0;
  std::atomic<int64_t> workspace = 0;
};
inline Tally tally;

/// The stream on which launches are counted in `tally` and nothing starts.
inline CUstream_st* counting_stream() { return reinterpret_cast<CUstream_st*>(&tally); }

}  // namespace edm2::cuda
