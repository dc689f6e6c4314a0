// How a convolution is cut into tiles of a matrix product: the tile shapes there are, and which of them a problem gets.
// Plain C++, for the launcher, the tests and the benchmarks alike.
#pragma once

#include <algorithm>
#include <cstdint>

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

/// The matrix product that a convolution amounts to. Forward: pixels x out, summed over in and taps. Input gradient:
/// pixels x in, summed over out and taps. Weight gradient: out x (taps, in), summed over pixels.
struct ConvProduct {
  int64_t rows;
  int64_t columns;
  int64_t steps;  // of kConvDepth
};

constexpr int64_t conv_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr ConvProduct conv_product(ConvDirection direction, const ConvShape& shape) {
  switch (direction) {
    case ConvDirection::kForward:
      return {shape.pixels(), shape.out, shape.taps() * conv_ceil_div(shape.in, kConvDepth)};
    case ConvDirection::kBackwardInput:
      return {shape.pixels(), shape.in, shape.taps() * conv_ceil_div(shape.out, kConvDepth)};
    default:
      return {shape.out, shape.taps() * shape.in, conv_ceil_div(shape.pixels(), kConvDepth)};
  }
}

constexpr int64_t conv_tiles(const ConvProduct& product, const ConvTile& tile) {
  return conv_ceil_div(product.rows, tile.rows) * conv_ceil_div(product.columns, tile.columns);
}

/// Clock cycles that a plan is expected to take: every multiprocessor multiplies its share of the blocks one after the
/// other, and the sums of several splits go through memory once more.
constexpr double conv_cycles(const ConvProduct& product, const ConvPlan& plan, int multiprocessors) {
  constexpr double kProductsPerCycle = 1024.0;  // of a multiprocessor
  constexpr double kCyclesPerBlock = 1500.0;    // until the first operands are there, and for storing
  constexpr double kBytesPerCycle = 12.0;       // of a multiprocessor's share of the memory
  constexpr double kCyclesPerLaunch = 4000.0;
  const ConvTile& tile = kConvTiles[plan.tile];
  const int64_t blocks = conv_tiles(product, tile) * plan.splits;
  const double deep = static_cast<double>(conv_ceil_div(product.steps, plan.splits) * kConvDepth);
  const double per_block = deep * tile.rows * tile.columns / (kProductsPerCycle * tile.utility);
  const auto rounds = static_cast<double>(conv_ceil_div(blocks, multiprocessors));
  // A block alone on its multiprocessor does not hide all of its latency.
  const double alone = rounds < tile.blocks ? 1.0 + 0.3 * (tile.blocks - rounds) / tile.blocks : 1.0;
  double cycles = rounds * (per_block * alone + kCyclesPerBlock);
  if (plan.splits > 1) {
    const double bytes = 2.0 * 4.0 * plan.splits * static_cast<double>(product.rows * product.columns);
    cycles += bytes / (kBytesPerCycle * multiprocessors) + kCyclesPerLaunch;
  }
  return cycles;
}

/// The plan of fewest cycles, the first of equals.
inline ConvPlan plan_conv(ConvDirection direction, const ConvShape& shape, int multiprocessors) {
  constexpr int kSplits[] = {1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64};
  const ConvProduct product = conv_product(direction, shape);
  ConvPlan best = {0, 1};
  double least = conv_cycles(product, best, multiprocessors);
  for (int tile = 0; tile < kConvTileCount; ++tile) {
    for (const int splits : kSplits) {
      if (splits > product.steps) break;
      const double cycles = conv_cycles(product, {tile, splits}, multiprocessors);
      if (cycles < least) {
        best = {tile, splits};
        least = cycles;
      }
    }
  }
  return best;
}

/// Floats that the parts of a split sum need.
constexpr int64_t conv_workspace(const ConvProduct& product, const ConvPlan& plan) {
  return plan.splits > 1 ? plan.splits * product.rows * product.columns : 0;
}

}  // namespace edm2
