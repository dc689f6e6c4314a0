#include "edm2/conv_weight_grad.h"

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// Loops over arrays of floats would not keep their sums in registers.
typedef float Vector __attribute__((vector_size(kConvLanes * sizeof(float)), aligned(alignof(float))));

/// Bytes of images worked on at a time, so that they stay in the second-level cache.
constexpr int64_t kBlockBytes = 1 << 17;

/// A tile of y: up to kConvTileOut * kConvTileIn channels at one offset of x against grad.
struct Tile {
  int64_t out;
  int64_t rows;
  int64_t in;
  int64_t dh;
  int64_t dw;
  float* sum;  // [kConvTileOut, kConvTileIn]
};

/// The tile that is work item `item`.
Tile tile_of(const ConvWeightGradParams& p, int64_t item, float* sum) {
  const int64_t positions = p.kernel_size * p.kernel_size;
  const int64_t position = item % positions;
  const int64_t tiles_in = conv_tiles(p.in_channels, kConvTileIn);
  const int64_t tiles_out = conv_tiles(p.out_channels, kConvTileOut);
  const int64_t row = item / positions / tiles_in;
  const int64_t out = p.out_channels * row / tiles_out;  // tiles of nearly equal height
  return {.out = out,
          .rows = p.out_channels * (row + 1) / tiles_out - out,
          .in = item / positions % tiles_in * kConvTileIn,
          .dh = position / p.kernel_size - p.kernel_size / 2,
          .dw = position % p.kernel_size - p.kernel_size / 2,
          .sum = sum};
}

/// Adds to the tile's sum what the images [n, last) give, few enough to be summed at once.
template <int Rows, int Vectors>
void add_at_once(const ConvWeightGradParams& p, const Tile& tile, int64_t n, int64_t last) {
  Vector sums[Rows][Vectors] = {};
  const int64_t h_first = max(0, -tile.dh), h_last = min(p.height, p.height - tile.dh);
  const int64_t w_first = max(0, -tile.dw), w_last = min(p.width, p.width - tile.dw);
  for (; n < last; ++n) {
    for (int64_t h = h_first; h < h_last; ++h) {
      const float* grad = p.grad + ((n * p.height + h) * p.width + w_first) * p.out_channels + tile.out;
      const float* x = p.x + ((n * p.height + h + tile.dh) * p.width + w_first + tile.dw) * p.in_channels + tile.in;
      for (int64_t w = w_first; w < w_last; ++w, grad += p.out_channels, x += p.in_channels) {
        Vector values[Vectors];
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) values[j] = *reinterpret_cast<const Vector*>(x + j * kConvLanes);
#pragma GCC unroll 6
        for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
          for (int j = 0; j < Vectors; ++j) sums[i][j] += grad[i] * values[j];
        }
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < Vectors; ++j) {
      *reinterpret_cast<Vector*>(tile.sum + i * kConvTileIn + j * kConvLanes) += sums[i][j];
    }
  }
}

/// Pixels summed at once, unless an image has more: one long sum would lose digits.
constexpr int64_t kPixelsAtOnce = 64;

template <int Rows, int Vectors>
void add_images(const ConvWeightGradParams& p, const Tile& tile, int64_t n, int64_t last) {
  const int64_t step = max(1, kPixelsAtOnce / max(1, p.height * p.width));
  for (; n < last; n += step) add_at_once<Rows, Vectors>(p, tile, n, min(last, n + step));
}

/// The same for a tile of any size.
template <int Rows = kConvTileOut>
void add_images(const ConvWeightGradParams& p, const Tile& tile, int64_t n, int64_t last) {
  if constexpr (Rows > 1) {
    if (tile.rows < Rows) return add_images<Rows - 1>(p, tile, n, last);
  }
  if (p.in_channels - tile.in >= kConvTileIn) {
    add_images<Rows, kConvTileIn / kConvLanes>(p, tile, n, last);
  } else {
    add_images<Rows, 1>(p, tile, n, last);
  }
}

}  // namespace

void conv_weight_grad(const ConvWeightGradParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kTile = kConvTileOut * kConvTileIn;
  const auto sum_of = [&](int64_t item) { return p.partial + item * kTile; };
  __builtin_memset(sum_of(begin), 0, static_cast<size_t>((end - begin) * kTile) * sizeof(float));
  const int64_t image_bytes = p.height * p.width * (p.in_channels + p.out_channels) * int64_t{sizeof(float)};
  const int64_t images = max(1, kBlockBytes / max(1, image_bytes));
  for (int64_t n = 0; n < p.batch; n += images) {
    for (int64_t item = begin; item < end; ++item) {
      add_images(p, tile_of(p, item, sum_of(item)), n, min(p.batch, n + images));
    }
  }
  const int64_t positions = p.kernel_size * p.kernel_size;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tile_of(p, item, sum_of(item));
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* y = p.y + ((tile.out + i) * p.in_channels + tile.in) * positions + item % positions;
      for (int64_t j = 0; j < min(kConvTileIn, p.in_channels - tile.in); ++j) {
        y[j * positions] = tile.sum[i * kConvTileIn + j];
      }
    }
  }
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
