#include "networks.h"

namespace edm2::bench {

std::vector<Network> networks(Size size) {
  if (size == Size::kGPU) return {{"EDM2-S", 192, 4, 3}, {"EDM2-XXL", 448, 4, 3}};
  return {{"a small network", size == Size::kSmall ? 8 : 32, 2, 1}};
}

std::vector<Weight> weights_of(const Network& network) {
  const int64_t base = network.model_channels;
  const int64_t emb = base * network.levels;
  std::vector<Weight> weights{{emb, base}, {emb, 1000}, {base, 5 * 9}};
  const auto block = [&](int64_t in, int64_t out, bool decoder, bool attention) {
    weights.push_back({out, (decoder ? in : out) * 9});
    weights.push_back({out, emb});
    weights.push_back({out, out * 9});
    if (in != out) weights.push_back({out, in});
    if (attention) {
      weights.push_back({3 * out, out});
      weights.push_back({out, out});
    }
  };
  std::vector<int64_t> skips{base};
  int64_t width = base;
  for (int64_t level = 0; level < network.levels; ++level) {
    if (level > 0) {
      block(width, width, false, false);
      skips.push_back(width);
    }
    for (int64_t i = 0; i < network.blocks; ++i) {
      block(width, base * (level + 1), false, level >= network.levels - 2);
      skips.push_back(width = base * (level + 1));
    }
  }
  for (int64_t level = network.levels - 1; level >= 0; --level) {
    block(width, width, true, level == network.levels - 1);
    if (level == network.levels - 1) block(width, width, true, false);
    for (int64_t i = 0; i <= network.blocks; ++i) {
      block(width + skips.back(), base * (level + 1), true, level >= network.levels - 2);
      skips.pop_back();
      width = base * (level + 1);
    }
  }
  weights.push_back({4, base * 9});
  return weights;
}

}  // namespace edm2::bench
