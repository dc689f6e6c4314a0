// How a convolution is cut into tiles of a matrix product: the tile shapes there are, and which of them a problem gets.
// Plain C++, for the launcher, the tests and the benchmarks alike.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "edm2/mp_conv2d.h"

namespace edm2 {

/// Rows x columns of the product for one thread block, shared among warps_m x warps_n warps.
struct ConvTile {
  int rows;
  int columns;
  int warps_m;
  int warps_n;
  int stages;      // tiles of the operands in shared memory
  int blocks;      // per multiprocessor that the registers are limited for
  double utility;  // share of the tensor cores' peak expected of a full multiprocessor

  constexpr int threads() const { return 32 * warps_m * warps_n; }
};

/// What both operands' tiles are deep: two steps of the tensor cores.
inline constexpr int kConvDepth = 32;
static_assert(kConvHalf % kConvDepth == 0);  // a step lies in one half

/// Of operands and, afterwards, of the sums on their way to memory.
constexpr int conv_shared_bytes(const ConvTile& tile) {
  return tile.stages * (tile.rows + tile.columns) * kConvDepth * 2;
}

inline constexpr ConvTile kConvTiles[] = {
    {256, 128, 4, 2, 3, 1, 0.85},
    {128, 192, 2, 4, 3, 1, 0.80},
    {128, 128, 2, 2, 3, 2, 0.80},
    {64, 64, 2, 2, 4, 4, 0.50},
};
inline constexpr int kConvTileCount = 4;

/// The plan for kQKVNorm: a tile as wide as a head's q, k and v, whose sums are whole.
inline constexpr ConvPlan kConvQKVPlan = {1, 1};
static_assert(kConvTiles[kConvQKVPlan.tile].columns == 3 * kConvHead);

// ---- Hopper: warpgroups, operands copied by TMA ----

/// Rows x columns of the product for two warpgroups, and what fits into shared memory.
struct ConvWgmmaTile {
  int rows;
  int columns;
  int stages;
};

inline constexpr int kConvWgmmaTileCount = 2;
inline constexpr int kConvWgmmaDepth = 64;  // of both operands' tiles
inline constexpr int kConvWgmmaBlocks = 2;  // of a cluster, which share the second operand
inline constexpr int kConvWgmmaChunk = 32;  // columns stored at a time
inline constexpr int kConvWgmmaPadded = kConvWgmmaChunk + 8;
inline constexpr int kConvWgmmaSharedBytes = 227 * 1024;

/// The first tile suits channels in multiples of 192, the second the others.
constexpr ConvWgmmaTile conv_wgmma_tile(ConvDirection direction, int tile) {
  const int rows = direction == ConvDirection::kBackwardWeight ? 128 : 256;
  const int columns = tile == 0 ? 192 : 128;
  constexpr int kForStoring = 8 * 16 * kConvWgmmaPadded * 4 + 1024;  // of eight warps, and barriers
  return {rows, columns, (kConvWgmmaSharedBytes - kForStoring) / ((rows + columns) * kConvWgmmaDepth * 2)};
}

/// Whether a plan's tile is one of these; they are counted from kConvTileCount on.
constexpr bool is_wgmma(const ConvPlan& plan) { return plan.tile >= kConvTileCount; }

/// The matrix product that a convolution amounts to. Forward: pixels x out, summed over in and taps. Input gradient:
/// pixels x in, summed over out and taps. Weight gradient: out x (taps, in), summed over pixels.
struct ConvProduct {
  int64_t rows;
  int64_t columns;
  int64_t steps;  // of kConvDepth, or the depth asked for
};

constexpr int64_t conv_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr ConvProduct conv_product(ConvDirection direction, const ConvShape& shape, int depth = kConvDepth) {
  switch (direction) {
    case ConvDirection::kForward:
      return {shape.pixels(), shape.out, shape.taps() * conv_ceil_div(shape.in, depth)};
    case ConvDirection::kBackwardInput:
      return {shape.pixels(), shape.in, shape.taps() * conv_ceil_div(shape.out, depth)};
    default:
      return {shape.out, shape.taps() * shape.in, conv_ceil_div(shape.pixels(), depth)};
  }
}

/// The product that a plan computes.
constexpr ConvProduct conv_product(ConvDirection direction, const ConvShape& shape, const ConvPlan& plan) {
  return conv_product(direction, shape, is_wgmma(plan) ? kConvWgmmaDepth : kConvDepth);
}

constexpr int64_t conv_tiles(const ConvProduct& product, const ConvTile& tile) {
  return conv_ceil_div(product.rows, tile.rows) * conv_ceil_div(product.columns, tile.columns);
}

/// Pairs of tiles, one below the other, that a cluster of blocks on Hopper works off. Tiles of the weight's gradient
/// keep to one tap.
constexpr int64_t conv_wgmma_works(ConvDirection direction, const ConvShape& shape, int tile) {
  const ConvWgmmaTile size = conv_wgmma_tile(direction, tile);
  const ConvProduct product = conv_product(direction, shape, kConvWgmmaDepth);
  const int64_t columns = direction == ConvDirection::kBackwardWeight
                              ? shape.taps() * conv_ceil_div(shape.in, size.columns)
                              : conv_ceil_div(product.columns, size.columns);
  return conv_ceil_div(product.rows, size.rows * kConvWgmmaBlocks) * columns;
}

/// Clock cycles that a plan is expected to take: every multiprocessor multiplies its share of the blocks one after the
/// other, and the sums of several splits go through memory once more.
constexpr double conv_cycles(ConvDirection direction, const ConvShape& shape, const ConvPlan& plan,
                             int multiprocessors) {
  constexpr double kCyclesPerBlock = 1500.0;  // until the first operands are there, and for storing
  constexpr double kBytesPerCycle = 12.0;     // of a multiprocessor's share of the memory
  constexpr double kCyclesPerLaunch = 4000.0;
  const ConvProduct product = conv_product(direction, shape, plan);
  const auto deep = static_cast<double>(conv_ceil_div(product.steps, plan.splits));
  double cycles = 0.0;
  if (is_wgmma(plan)) {
    constexpr double kProductsPerCycle = 2048.0 * 0.75;  // of a multiprocessor, and the share expected
    const ConvWgmmaTile tile = conv_wgmma_tile(direction, plan.tile - kConvTileCount);
    const int64_t work = conv_wgmma_works(direction, shape, plan.tile - kConvTileCount) * plan.splits;
    const auto rounds = static_cast<double>(conv_ceil_div(work * kConvWgmmaBlocks, multiprocessors));
    cycles = rounds * (deep * kConvWgmmaDepth * tile.rows * tile.columns / kProductsPerCycle + kCyclesPerBlock);
  } else {
    constexpr double kProductsPerCycle = 1024.0;
    const ConvTile& tile = kConvTiles[plan.tile];
    const double per_block = deep * kConvDepth * tile.rows * tile.columns / (kProductsPerCycle * tile.utility);
    const auto rounds = static_cast<double>(conv_ceil_div(conv_tiles(product, tile) * plan.splits, multiprocessors));
    // A block alone on its multiprocessor does not hide all of its latency.
    const double alone = rounds < tile.blocks ? 1.0 + 0.3 * (tile.blocks - rounds) / tile.blocks : 1.0;
    cycles = rounds * (per_block * alone + kCyclesPerBlock);
  }
  if (plan.splits > 1) {
    const double bytes = 2.0 * 4.0 * plan.splits * static_cast<double>(product.rows * product.columns);
    cycles += bytes / (kBytesPerCycle * multiprocessors) + kCyclesPerLaunch;
  }
  return cycles;
}

inline constexpr int kConvSplits[] = {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64};

/// The plan of fewest cycles with one of the tiles [first, last), the first of equals.
inline ConvPlan plan_conv(ConvDirection direction, const ConvShape& shape, int multiprocessors, int first = 0,
                          int last = kConvTileCount) {
  ConvPlan best = {first, 1};
  double least = conv_cycles(direction, shape, best, multiprocessors);
  for (int tile = first; tile < last; ++tile) {
    for (const int splits : kConvSplits) {
      const ConvPlan plan = {tile, splits};
      if (splits > conv_product(direction, shape, plan).steps) break;
      const double cycles = conv_cycles(direction, shape, plan, multiprocessors);
      if (cycles < least) {
        best = plan;
        least = cycles;
      }
    }
  }
  return best;
}

/// The plans of a tile that are worth trying: those of fewest cycles, best first. Returns how many there are.
inline constexpr int kConvTried = 3;
inline int conv_plans_to_try(ConvDirection direction, const ConvShape& shape, int tile, int multiprocessors,
                             ConvPlan (&plans)[kConvTried]) {
  int count = 0;
  for (const int splits : kConvSplits) {
    ConvPlan plan = {tile, splits};
    if (splits > conv_product(direction, shape, plan).steps) break;
    const auto cycles = [&](const ConvPlan& p) { return conv_cycles(direction, shape, p, multiprocessors); };
    for (int i = 0; i < count; ++i) {
      if (cycles(plan) < cycles(plans[i])) std::swap(plan, plans[i]);
    }
    if (count < kConvTried) plans[count++] = plan;
  }
  return count;
}

/// Floats that the parts of a split sum need.
constexpr int64_t conv_workspace(const ConvProduct& product, const ConvPlan& plan) {
  return plan.splits > 1 ? plan.splits * product.rows * product.columns : 0;
}

}  // namespace edm2
