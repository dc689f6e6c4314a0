// Index arithmetic of the convolution kernels, for host and device.
#pragma once

#include <cstdint>

#include "edm2/math.h"

namespace edm2 {

/// Division of numbers below 2^31 by a number found at run time: a multiplication and a shift.
struct FastDivisor {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;
};

/// 2^shift is the smallest power of two not below the divisor; multiplier = floor(2^32 (2^shift - divisor) / divisor) +
/// 1.
inline FastDivisor fast_divisor(uint32_t divisor) {
  uint32_t shift = 0;
  while ((uint64_t{1} << shift) < divisor) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - divisor;
  return {divisor, static_cast<uint32_t>((excess << 32) / divisor + 1), shift};
}

EDM2_FORMULA int divide(int number, const FastDivisor& by) {
  const auto n = static_cast<uint32_t>(number);
  return static_cast<int>((static_cast<uint32_t>(uint64_t{n} * by.multiplier >> 32) + n) >> by.shift);
}

/// The sizes of a convolution as its kernels take them.
struct ConvSizes {
  int pixels;
  int height;
  int width;
  int in;
  int out;
  int kernel_height;
  int kernel_width;
  FastDivisor by_height;
  FastDivisor by_width;
};

struct PixelPlace {
  int row;
  int column;
};

EDM2_FORMULA PixelPlace place_of(const ConvSizes& sizes, int pixel) {
  const int line = divide(pixel, sizes.by_width);
  return {line - divide(line, sizes.by_height) * sizes.height, pixel - line * sizes.width};
}

/// Whether the pixel that lies (rows, columns) from the given one is in the image, and not padding.
EDM2_FORMULA bool is_inside(const ConvSizes& sizes, const PixelPlace& place, int rows, int columns) {
  return static_cast<unsigned>(place.row + rows) < static_cast<unsigned>(sizes.height) &&
         static_cast<unsigned>(place.column + columns) < static_cast<unsigned>(sizes.width);
}

/// One bit per tap of the filter: whether its pixel is in the image. None beyond the last pixel.
EDM2_FORMULA uint32_t taps_inside(const ConvSizes& sizes, int pixel) {
  const PixelPlace place = place_of(sizes, pixel);
  uint32_t columns = 0;
  for (int s = 0; s < sizes.kernel_width; ++s) {
    columns |= static_cast<uint32_t>(is_inside(sizes, place, 0, s - sizes.kernel_width / 2)) << s;
  }
  uint32_t inside = 0;
  for (int r = 0; r < sizes.kernel_height; ++r) {
    const bool row = is_inside(sizes, place, r - sizes.kernel_height / 2, 0);
    inside |= (row ? columns : 0) << r * sizes.kernel_width;
  }
  return pixel < sizes.pixels ? inside : 0;
}

/// Where a row's pack of 16 bytes lies in shared memory, in bytes from the tile's start; the tile's rows are `packs`
/// long, 4 or a multiple of 8. The same pack of 8 neighbouring rows, and neighbouring packs of a row, lie in different
/// banks.
EDM2_FORMULA int swizzled(int row, int pack, int packs) {
  return (row * packs + (pack ^ (packs >= 8 ? row % 8 : row / 2 % 4))) * 16;
}

/// On Hopper: a tile of the product and the part of its sum that a block works on next.
struct WgmmaWork {
  int row_tile;
  int column_tile;
  int split;
  int first;  // of `count` steps
  int count;
};

/// The index-th work of all, for block `rank` of `blocks` in its cluster, whose tiles lie one below the other; there
/// are column_tiles * row_pairs tiles for a cluster. Neighbours share rows.
EDM2_FORMULA WgmmaWork wgmma_work(int index, int rank, int blocks, int column_tiles, int row_pairs, int steps,
                                  int splits) {
  const int tiles = column_tiles * row_pairs;
  const int split = index / tiles;
  const auto first = static_cast<int>(int64_t{steps} * split / splits);
  const auto last = static_cast<int>(int64_t{steps} * (split + 1) / splits);
  return {index % tiles / column_tiles * blocks + rank, index % tiles % column_tiles, split, first, last - first};
}

/// Columns [first, last) of the product.
struct WgmmaColumns {
  int first;
  int last;
};

/// Those of a column of tiles. Tiles of the weight's gradient keep to one tap, whose `of_tap` columns are its channels;
/// for others, of_tap are all.
EDM2_FORMULA WgmmaColumns wgmma_columns(int column_tile, int tile_columns, int of_tap) {
  const int tiles = (of_tap + tile_columns - 1) / tile_columns;
  const int begin = column_tile / tiles * of_tap;
  const int first = begin + column_tile % tiles * tile_columns;
  return {first, first + tile_columns < begin + of_tap ? first + tile_columns : begin + of_tap};
}

}  // namespace edm2
