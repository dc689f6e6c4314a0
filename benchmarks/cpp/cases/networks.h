// Whole networks, for kernels that work on all weights at once.
#pragma once

#include <cstdint>
#include <vector>

#include "../cases.h"

namespace edm2::bench {

struct Network {
  const char* name;
  int64_t model_channels;
  int64_t levels;  // channels 1, 2, ... times model_channels
  int64_t blocks;  // of a level
};

struct Weight {
  int64_t rows;
  int64_t row_size;
};

std::vector<Network> networks(Size size);

/// The weights of the U-Net for latents [4, ., .] and 1000 classes, attention on the two lower levels (spec 3.1
/// to 3.3).
std::vector<Weight> weights_of(const Network& network);

/// Tensors laid end to end in one buffer, each at a multiple of 16 bytes.
struct Ends {
  std::vector<int64_t> offsets;
  int64_t numel = 0;

  explicit Ends(const std::vector<Weight>& weights) {
    for (const Weight& weight : weights) {
      offsets.push_back(numel);
      numel += (weight.rows * weight.row_size + 7) / 8 * 8;
    }
  }
};

}  // namespace edm2::bench
