// 2x resampling of every channel (spec 2.11). Images are [outer, height, width, inner]: outer = samples and inner =
// channels if channels_last, outer = planes and inner = 1 if contiguous.
//
// Filter (1, 1): a coarse pixel belongs to a cell of 2 x 2 fine pixels, whose mean it is (down) or which are its copies
// (up). Packs of channels, or single elements, take their cells as they are; packs of one plane's coarse pixels
// (kPairs) are made of pairs of fine neighbours. Any other filter: one thread per pack of outputs gathers what they are
// made of, each input coming from memory once and else from cache.
#pragma once

#include "device.cuh"

namespace edm2::cuda {

/// The two images and the cells of the fine one. Where the fine size is odd, the last row or column of cells reaches
/// past the fine image and has no coarse pixels.
struct CellGrid {
  int64_t outer;
  int64_t inner;
  int64_t fine_height;
  int64_t fine_width;
  int64_t coarse_height;
  int64_t coarse_width;
};

/// One cell of one image: where its pixels are.
struct Cell {
  int64_t fine;    // offset of the top left fine pixel
  int64_t coarse;  // offset of the coarse pixel
  int64_t right;   // from a fine pixel to its right neighbour
  int64_t below;   // and to that below
  bool has_coarse;
  bool has_right;
  bool has_below;

  __device__ Cell(const CellGrid& grid, int64_t outer, int64_t row, int64_t column)
      : fine(((outer * grid.fine_height + 2 * row) * grid.fine_width + 2 * column) * grid.inner),
        coarse(((outer * grid.coarse_height + row) * grid.coarse_width + column) * grid.inner),
        right(grid.inner),
        below(grid.fine_width * grid.inner),
        has_coarse(row < grid.coarse_height && column < grid.coarse_width),
        has_right(2 * column + 1 < grid.fine_width),
        has_below(2 * row + 1 < grid.fine_height) {}
};

/// Sums over N neighbouring cells, or, unless kPairs, over one cell for N channels; x points to its first fine pixel.
template <int N, bool kPairs, typename T>
__device__ Floats<N> sum_over_cell(const T* x, const Cell& cell) {
  if constexpr (kPairs) {
    const auto left = load<N>(x) + load<N>(x + cell.below);
    const auto right = load<N>(x + N) + load<N>(x + N + cell.below);
    Floats<N> sums;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      sums.v[i] = left.v[2 * i] + left.v[2 * i + 1];
      sums.v[N / 2 + i] = right.v[2 * i] + right.v[2 * i + 1];
    }
    return sums;
  } else {
    const auto above = load<N>(x) + load<N>(x + cell.right);
    return above + (load<N>(x + cell.below) + load<N>(x + cell.below + cell.right));
  }
}

/// Stores N coarse values to the fine pixels of their cells, or, unless kPairs, to those of one cell for N channels.
template <int N, bool kPairs, typename T>
__device__ void spread_over_cell(T* x, const Cell& cell, const Floats<N>& values) {
  if constexpr (kPairs) {
    Floats<N> left;
    Floats<N> right;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      left.v[i] = values.v[i / 2];
      right.v[i] = values.v[N / 2 + i / 2];
    }
    store(x, left);
    store(x + N, right);
    if (cell.has_below) {
      store(x + cell.below, left);
      store(x + cell.below + N, right);
    }
  } else {
    store(x, values);
    if (cell.has_right) store(x + cell.right, values);
    if (cell.has_below) store(x + cell.below, values);
    if (cell.has_right && cell.has_below) store(x + cell.below + cell.right, values);
  }
}

/// Work items (outer, row of cells, column, pack) of `rows` x `columns` cells; a column is N cells wide if kPairs.
struct CellItems {
  int64_t rows;
  int64_t columns;
  int64_t packs;
  int64_t count;
};

template <int N, bool kPairs>
__device__ Cell cell_of(const CellGrid& grid, const CellItems& items, int64_t item, int64_t& channel) {
  channel = item % items.packs * N;
  const int64_t column = item / items.packs % items.columns * (kPairs ? N : 1);
  const int64_t row = item / items.packs / items.columns;
  return Cell(grid, row / items.rows, row % items.rows, column);
}

/// Filter (1, 1), fine to coarse: y = weight * (sum over the cell of x).
template <typename T, int N, bool kPairs>
__global__ void __launch_bounds__(kThreads)
    resample_down_cells(const T* __restrict__ x, T* __restrict__ y, CellGrid grid, CellItems items, float weight) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < items.count; i += gridDim.x * int64_t{kThreads}) {
    int64_t channel = 0;
    const Cell cell = cell_of<N, kPairs>(grid, items, i, channel);
    store(y + cell.coarse + channel, sum_over_cell<N, kPairs>(x + cell.fine + channel, cell) * weight);
  }
}

/// Filter (1, 1), coarse to fine: y = weight * x all over the cell, 0 where there is no coarse pixel.
template <typename T, int N, bool kPairs>
__global__ void __launch_bounds__(kThreads)
    resample_up_cells(const T* __restrict__ x, T* __restrict__ y, CellGrid grid, CellItems items, float weight) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < items.count; i += gridDim.x * int64_t{kThreads}) {
    int64_t channel = 0;
    const Cell cell = cell_of<N, kPairs>(grid, items, i, channel);
    Floats<N> values = {};
    if (cell.has_coarse) values = load<N>(x + cell.coarse + channel) * weight;
    spread_over_cell<N, kPairs>(y + cell.fine + channel, cell, values);
  }
}

/// A filter of any even length.
struct Taps {
  static constexpr int kMost = 128;
  float tap[kMost];
  int count;
};

/// Which inputs the taps of an output position meet along an axis. Down: tap k meets input 2 * out + k - half. Up: tap
/// k = phase, phase + 2, ... meets input (out + half - k) / 2.
template <bool kUp>
struct TapsOfOutput {
  static constexpr int kStep = kUp ? 2 : 1;
  int64_t origin;
  int first;

  __device__ TapsOfOutput(int64_t out, int half)
      : origin(kUp ? out + half : 2 * out - half), first(kUp ? static_cast<int>(origin % 2) : 0) {}

  __device__ int64_t input(int k) const { return kUp ? (origin - k) / 2 : origin + k; }
};

/// x [outer, height, width, inner] -> y [outer, out_height, out_width, inner].
struct ImageSizes {
  int64_t outer;
  int64_t inner;
  int64_t height;
  int64_t width;
  int64_t out_height;
  int64_t out_width;
};

template <typename T, int N, bool kUp>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    resample_gather(const T* __restrict__ x, T* __restrict__ y, ImageSizes sizes, int64_t items,
                    const __grid_constant__ Taps taps) {
  const int half = (taps.count - 1) / 2;
  const int64_t packs = sizes.inner / N;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < items; i += gridDim.x * int64_t{kThreads}) {
    const int64_t out_row = i / packs / sizes.out_width;
    const TapsOfOutput<kUp> across(i / packs % sizes.out_width, half);
    const TapsOfOutput<kUp> down(out_row % sizes.out_height, half);
    const T* image = x + out_row / sizes.out_height * sizes.height * sizes.width * sizes.inner + i % packs * N;
    Floats<N> total = {};
#pragma unroll 1
    for (int ky = down.first; ky < taps.count; ky += TapsOfOutput<kUp>::kStep) {
      const int64_t row = down.input(ky);
      if (row < 0 || row >= sizes.height) continue;
      Floats<N> row_sum = {};
#pragma unroll 2
      for (int kx = across.first; kx < taps.count; kx += TapsOfOutput<kUp>::kStep) {
        const int64_t column = across.input(kx);
        if (column < 0 || column >= sizes.width) continue;
        row_sum = row_sum + load<N>(image + (row * sizes.width + column) * sizes.inner) * taps.tap[kx];
      }
      total = total + row_sum * taps.tap[ky];
    }
    store(y + i * N, total);
  }
}

}  // namespace edm2::cuda
