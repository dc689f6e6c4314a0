// What edm2_cuda_bench and edm2_cpu_bench time: one table for both, cases.cpp. Neither needs Python or torch.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "edm2/common.h"

namespace edm2::bench {

/// Memory that a case works on. `random`: filled with values of the dtype between -2 and 2 before the first call;
/// `zeros`: with zeros; neither: written by the call before anything reads it.
struct Buffer {
  int64_t numel;
  DType dtype;
  bool random;
  bool zeros = false;

  int64_t bytes() const;
};

using Pointers = std::vector<void*>;  // one for each buffer

struct Case {
  std::string name;
  std::vector<Buffer> buffers;
  std::function<int(const Pointers&, CUstream_st*)> gpu;  // empty in edm2_cpu_bench, and where there is no CUDA kernel
  std::function<void(const Pointers&)> cpu;               // all work in one thread; empty in edm2_cuda_bench
  int64_t products = 0;                                   // multiply-adds, of products
};

/// small: odd and even shapes of every layout and dtype, for a sanitizer. cpu: what lies in the caches of a CPU. gpu:
/// at least 256 MB, more than the caches of a GPU, and the weights of whole networks.
enum class Size { kSmall, kCPU, kGPU };

std::vector<Case> all_cases(Size size);

}  // namespace edm2::bench
