#include "edm2/conv_weight_grad.h"

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// Vectors in registers, and in memory. Loops over arrays of floats would not keep their sums in registers.
template <int Lanes>
struct Floats {
  typedef float Vector __attribute__((vector_size(Lanes * sizeof(float))));
  typedef float InMemory __attribute__((vector_size(Lanes * sizeof(float)), aligned(alignof(float))));
};

/// A tile of y that is summed in registers: most of them, so that multiply-adds need not wait for each other.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 12;
#else
constexpr int kLanes = 8;
constexpr int kRows = 6;
#endif

/// Bytes of images worked on at a time, so that they stay in the second-level cache.
constexpr int64_t kBlockBytes = 1 << 17;

/// Up to kConvTileOut * kConvTileIn channels at one offset of x against grad.
struct Tile {
  int64_t out;
  int64_t rows;
  int64_t in;
  int64_t columns;
  int64_t dh;
  int64_t dw;
  float* sum;  // [kConvTileOut, kConvTileIn]

  Tile part(int64_t row, int64_t column) const {
    return {out + row, rows - row, in + column, columns - column, dh, dw, sum + row * kConvTileIn + column};
  }
};

/// The tile that is work item `item`.
Tile tile_of(const ConvWeightGradParams& p, int64_t item, float* sum) {
  const int64_t positions = p.kernel_size * p.kernel_size;
  const int64_t position = item % positions;
  const int64_t tiles_in = conv_tiles(p.in_channels, kConvTileIn);
  const int64_t tiles_out = conv_tiles(p.out_channels, kConvTileOut);
  const int64_t row = item / positions / tiles_in;
  const int64_t out = p.out_channels * row / tiles_out;  // tiles of nearly equal height
  const int64_t in = item / positions % tiles_in * kConvTileIn;
  return {.out = out,
          .rows = p.out_channels * (row + 1) / tiles_out - out,
          .in = in,
          .columns = min(kConvTileIn, p.in_channels - in),
          .dh = position / p.kernel_size - p.kernel_size / 2,
          .dw = position % p.kernel_size - p.kernel_size / 2,
          .sum = sum};
}

struct Products {
  template <class V>
  EDM2_FORMULA void add_product(V& sum, float grad, const V& x) {
    sum += grad * x;
  }
};

#if defined(__AVX512F__)
struct PairProducts {
  /// VDPBF16PS by its name: the set is compiled for processors without it, too.
  template <class V>
  EDM2_FORMULA void add_product(V& sum, float grad, const V& x) {
    typedef int32_t Bits __attribute__((vector_size(sizeof(V))));
    const V grads = reinterpret_cast<V>(math::to_bits(grad) - Bits{});
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(grads));
  }
};
#endif

/// Adds to the tile's sum what the images [n, last) give, few enough to be summed at once. Not inlined: in a function
/// of many such loops g++ runs out of registers.
template <class Multiply, int Lanes, int Rows, int Vectors>
__attribute__((noinline)) void add_at_once(const ConvWeightGradParams& p, const Tile& tile, int64_t n, int64_t last) {
  using Values = typename Floats<Lanes>::Vector;
  using InMemory = typename Floats<Lanes>::InMemory;
  Values sums[Rows][Vectors] = {};
  const int64_t h_first = max(0, -tile.dh), h_last = min(p.height, p.height - tile.dh);
  const int64_t w_first = max(0, -tile.dw), w_last = min(p.width, p.width - tile.dw);
  for (; n < last; ++n) {
    for (int64_t h = h_first; h < h_last; ++h) {
      const float* grad = as<float>(p.grad) + ((n * p.height + h) * p.width + w_first) * p.out_channels + tile.out;
      const float* x =
          as<float>(p.x) + ((n * p.height + h + tile.dh) * p.width + w_first + tile.dw) * p.in_channels + tile.in;
      for (int64_t w = w_first; w < w_last; ++w, grad += p.out_channels, x += p.in_channels) {
        Values values[Vectors];
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) values[j] = *reinterpret_cast<const InMemory*>(x + j * Lanes);
#pragma GCC unroll 12
        for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
          for (int j = 0; j < Vectors; ++j) Multiply::add_product(sums[i][j], grad[i], values[j]);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) {
      *reinterpret_cast<InMemory*>(tile.sum + i * kConvTileIn + j * Lanes) += sums[i][j];
    }
  }
}

/// Pixels summed at once, unless an image has more: one long sum would lose digits.
constexpr int64_t kPixelsAtOnce = 64;

template <class Multiply, int Lanes, int Vectors, int Rows = kRows>
void add_rows(const ConvWeightGradParams& p, const Tile& tile, int64_t n, int64_t last) {
  if constexpr (Rows > 1) {
    if (tile.rows < Rows) return add_rows<Multiply, Lanes, Vectors, Rows - 1>(p, tile, n, last);
  }
  const int64_t step = max(1, kPixelsAtOnce / max(1, p.height * p.width));
  for (; n < last; n += step) add_at_once<Multiply, Lanes, Rows, Vectors>(p, tile, n, min(last, n + step));
}

/// The same for a tile of any size.
template <class Multiply>
void add_images(const ConvWeightGradParams& p, const Tile& tile, int64_t n, int64_t last) {
  for (int64_t row = 0; row < tile.rows; row += kRows) {
    for (int64_t column = 0; column < tile.columns;) {
      const Tile part = tile.part(row, column);
      if (part.columns >= 2 * kLanes) {
        add_rows<Multiply, kLanes, 2>(p, part, n, last);
        column += 2 * kLanes;
      } else if (part.columns >= kLanes) {
        add_rows<Multiply, kLanes, 1>(p, part, n, last);
        column += kLanes;
      } else {
        add_rows<Multiply, kConvLanes, 1>(p, part, n, last);
        column += kConvLanes;
      }
    }
  }
}

}  // namespace

void conv_weight_grad(const ConvWeightGradParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kTile = kConvTileOut * kConvTileIn;
  const auto sum_of = [&](int64_t item) { return p.partial + item * kTile; };
  __builtin_memset(sum_of(begin), 0, static_cast<size_t>((end - begin) * kTile) * sizeof(float));
  const int64_t image_bytes = p.height * p.width * (p.in_channels + p.out_channels) * int64_t{sizeof(float)};
  const int64_t images = max(1, kBlockBytes / max(1, image_bytes));
  auto* add = &add_images<Products>;
#if defined(__AVX512F__)
  if (p.pairs) add = &add_images<PairProducts>;
#endif
  for (int64_t n = 0; n < p.batch; n += images) {
    for (int64_t item = begin; item < end; ++item) {
      add(p, tile_of(p, item, sum_of(item)), n, min(p.batch, n + images));
    }
  }
  const int64_t positions = p.kernel_size * p.kernel_size;
  for (int64_t item = begin; item < end; ++item) {
    const Tile tile = tile_of(p, item, sum_of(item));
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* y = p.y + ((tile.out + i) * p.in_channels + tile.in) * positions + item % positions;
      for (int64_t j = 0; j < tile.columns; ++j) y[j * positions] = tile.sum[i * kConvTileIn + j];
    }
  }
}

void conv_operand(const ConvOperandParams& p, int64_t begin, int64_t end) {
  const auto* images = as<BFloat16>(p.images);
  if (!p.pairs) {
    auto* operand = as<float>(p.operand);
    for (int64_t i = 2 * begin * p.size; i < min(2 * end, p.batch) * p.size; ++i) operand[i] = widen(images[i]);
    return;
  }
  for (int64_t pair = begin; pair < end; ++pair) {
    const BFloat16* even = images + 2 * pair * p.size;
    const BFloat16* odd = even + p.size;
    uint32_t* operand = as<uint32_t>(p.operand) + pair * p.size;
    if (2 * pair + 1 < p.batch) {
      for (int64_t i = 0; i < p.size; ++i) {
        operand[i] = static_cast<uint32_t>(even[i]) | static_cast<uint32_t>(odd[i]) << 16;
      }
    } else {
      for (int64_t i = 0; i < p.size; ++i) operand[i] = static_cast<uint32_t>(even[i]);
    }
  }
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
