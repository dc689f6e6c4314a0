// Convolution as a matrix product on tensor cores (NHWC implicit GEMM). A block computes tiles of the product; its
// operands pass through a ring of stages in shared memory, filled by asynchronous copies that read activations where
// the filter's taps point, zeros where they point into the padding. Device code only.
#pragma once

#include "device.cuh"
#include "edm2/mp_conv2d_index.h"
#include "edm2/mp_conv2d_plan.h"
#include "mp_sum.cuh"
#include "pixel_norm.cuh"
#include "tensor_core.cuh"

namespace edm2::cuda {

inline constexpr int kConvPack = 8;  // elements in 16 bytes

/// A tile of the product: constants derived from kConvTiles[Index].
template <int Index>
struct BlockTile {
  static constexpr ConvTile kTile = kConvTiles[Index];
  static constexpr int kRows = kTile.rows;
  static constexpr int kColumns = kTile.columns;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kStages = kTile.stages;
  static constexpr int kWarpRows = kRows / kTile.warps_m;
  static constexpr int kWarpColumns = kColumns / kTile.warps_n;
  static constexpr int kSharedBytes = conv_shared_bytes(kTile);
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0);
};

/// An operand's tile in shared memory, kConvDepth deep: a row per row or column of the product, or, DepthMajor, a row
/// per step of the sum.
template <int Extent, bool DepthMajor>
struct OperandTile {
  static constexpr int kPacks = (DepthMajor ? Extent : kConvDepth) / kConvPack;  // of a row
  static constexpr int kBytes = Extent * kConvDepth * 2;

  __device__ static int at(int row, int pack) { return swizzled(row, pack, kPacks); }

  /// The 16 x 16 elements at (outer, depth) as four 8 x 8 matrices for multiply_add. DepthOuter: in the order outer 0,
  /// depth 0 and 8, outer 8, depth 0 and 8, as the second operand wants them; else outer 0 and 8 at depth 0, then at 8.
  template <bool DepthOuter>
  __device__ static void load(uint32_t (&matrices)[4], const unsigned char* tile, int outer, int depth) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int low = lane % 8 + lane / 8 % 2 * 8;  // lanes 0-7 and 16-23: 0 to 7; the others: 8 to 15
    const int high = lane % 8 + lane / 16 * 8;    // lanes 0-15: 0 to 7; the others: 8 to 15
    if constexpr (DepthMajor) {
      const int row = DepthOuter ? low : high;
      const int pack = DepthOuter ? lane / 16 : lane / 8 % 2;
      load_matrices<true>(matrices, tile + at(depth + row, outer / kConvPack + pack));
    } else {
      const int row = DepthOuter ? high : low;
      const int pack = DepthOuter ? lane / 8 % 2 : lane / 16;
      load_matrices<false>(matrices, tile + at(outer + row, depth / kConvPack + pack));
    }
  }
};

/// What is done with the sums.
template <typename T>
struct ConvOutput {
  ConvEpilogue epilogue;
  T* y;
  T* out;
  const float* gain;
  const T* c;
  const T* skip;
  float weight_skip;
  float weight_y;
  float clip;
  uint8_t* mask;          // of the sum, a byte for eight channels; may be null
  FastDivisor by_pixels;  // of an image
  T* qkv[3];
  float eps;
};

/// The second half of an MP-Cat of which the activations x are the first.
template <typename T>
struct CatHalves {
  const T* b;
  int in_a;  // channels of the first
  float weight_a;
  float weight_b;
  float a_to_b;  // weight_a / weight_b
};

template <typename T>
struct ConvArguments {
  const T* a;  // activations: x, or the gradient of y
  const T* b;  // the weight; for its gradient x
  ConvSizes sizes;
  int rows;  // of the product
  int columns;
  int steps;
  int splits;
  float* parts;   // [splits, rows, columns] if there are several
  float* grad_w;  // of the weight gradient
  ConvOutput<T> output;
  CatHalves<T> halves;
};

// ---- where the sum stands ----

/// Sums over channels and taps: taps run fastest, so that the reads of neighbouring taps, nearly the same, come close
/// together.
struct FilterStep {
  int tap_row;
  int tap_column;
  int channel;  // first of kConvDepth

  __device__ FilterStep(const ConvSizes& sizes, int step) {
    const int taps = sizes.kernel_height * sizes.kernel_width;
    tap_row = step % taps / sizes.kernel_width;
    tap_column = step % taps % sizes.kernel_width;
    channel = step / taps * kConvDepth;
  }

  __device__ int tap(const ConvSizes& sizes) const { return tap_row * sizes.kernel_width + tap_column; }

  __device__ void advance(const ConvSizes& sizes) {
    if (++tap_column < sizes.kernel_width) return;
    tap_column = 0;
    if (++tap_row < sizes.kernel_height) return;
    tap_row = 0;
    channel += kConvDepth;
  }
};

/// Sums over pixels.
struct PixelStep {
  int pixel;  // first of kConvDepth

  __device__ PixelStep(const ConvSizes&, int step) : pixel(step * kConvDepth) {}
  __device__ void advance(const ConvSizes&) { pixel += kConvDepth; }
};

// ---- operands: each copies one tile per step ----

/// Shares out a tile of `Rows` rows: neighbouring threads take neighbouring packs of 16 bytes of a row.
template <int Threads, int Rows, int Packs>
struct CopyShare {
  static constexpr int kLanes = Packs < 8 ? Packs : 8;  // that share a row
  static constexpr int kRowStep = Threads / kLanes;
  static constexpr int kRowCount = Rows / kRowStep;
  static constexpr int kPackCount = Packs / kLanes;
  static_assert(kRowCount * kRowStep == Rows && kPackCount * kLanes == Packs);

  __device__ static int row() { return static_cast<int>(threadIdx.x) / kLanes; }
  __device__ static int pack() { return static_cast<int>(threadIdx.x) % kLanes; }
};

/// Rows of pixels as the taps see them: x, or the gradient of y for that of x.
template <typename Tile, typename T>
class PixelRows {
 public:
  using Shared = OperandTile<Tile::kRows, false>;

  __device__ PixelRows(const T* x, const ConvSizes& sizes, int channels, int first_pixel) : channels_(channels) {
    const int pixel = first_pixel + Share::row();
    const int first_tap = sizes.kernel_height / 2 * sizes.width + sizes.kernel_width / 2;
    source_ = x + int64_t{pixel - first_tap} * channels + Share::pack() * kConvPack;
#pragma unroll
    for (int i = 0; i < Share::kRowCount; ++i) inside_[i] = taps_inside(sizes, pixel + i * Share::kRowStep);
  }

  __device__ void copy(unsigned char* tile, const ConvSizes& sizes, const FilterStep& step) const {
    const T* source = source_ + int64_t{step.tap_row * sizes.width + step.tap_column} * channels_ + step.channel;
    const bool is_channel = step.channel + Share::pack() * kConvPack < channels_;
    const int tap = step.tap(sizes);
#pragma unroll
    for (int i = 0; i < Share::kRowCount; ++i) {
      copy_async(tile + Shared::at(Share::row() + i * Share::kRowStep, Share::pack()),
                 source + int64_t{i} * Share::kRowStep * channels_, is_channel && (inside_[i] >> tap & 1) != 0);
    }
  }

 private:
  using Share = CopyShare<Tile::kThreads, Tile::kRows, Shared::kPacks>;

  const T* source_;
  int channels_;
  uint32_t inside_[Share::kRowCount];
};

/// Filters, [out, taps, in]: a row per output channel.
template <typename Tile, typename T>
class FilterRows {
 public:
  using Shared = OperandTile<Tile::kColumns, false>;

  __device__ FilterRows(const T* w, const ConvSizes& sizes, int first_out)
      : out_(first_out + Share::row()),
        row_size_(sizes.kernel_height * sizes.kernel_width * sizes.in),
        source_(w + int64_t{out_} * row_size_ + Share::pack() * kConvPack) {}

  __device__ void copy(unsigned char* tile, const ConvSizes& sizes, const FilterStep& step) const {
    const T* source = source_ + int64_t{step.tap(sizes)} * sizes.in + step.channel;
    const bool is_channel = step.channel + Share::pack() * kConvPack < sizes.in;
#pragma unroll
    for (int i = 0; i < Share::kRowCount; ++i) {
      copy_async(tile + Shared::at(Share::row() + i * Share::kRowStep, Share::pack()),
                 source + int64_t{i} * Share::kRowStep * row_size_,
                 is_channel && out_ + i * Share::kRowStep < sizes.out);
    }
  }

 private:
  using Share = CopyShare<Tile::kThreads, Tile::kColumns, Shared::kPacks>;

  int out_;
  int row_size_;
  const T* source_;
};

/// Filters turned by 180 degrees, a row per output channel, over which the gradient of x sums, and a column per input
/// channel.
template <typename Tile, typename T>
class FilterColumns {
 public:
  using Shared = OperandTile<Tile::kColumns, true>;

  __device__ FilterColumns(const T* w, const ConvSizes& sizes, int first_in)
      : in_(first_in + Share::pack() * kConvPack),
        row_size_(sizes.kernel_height * sizes.kernel_width * sizes.in),
        source_(w + int64_t{Share::row()} * row_size_ + in_) {}

  __device__ void copy(unsigned char* tile, const ConvSizes& sizes, const FilterStep& step) const {
    const int tap = sizes.kernel_height * sizes.kernel_width - 1 - step.tap(sizes);
    const T* source = source_ + (int64_t{step.channel} * row_size_ + tap * sizes.in);
#pragma unroll
    for (int i = 0; i < Share::kRowCount; ++i) {
      const int row = Share::row() + i * Share::kRowStep;
      const bool is_out = step.channel + row < sizes.out;
#pragma unroll
      for (int j = 0; j < Share::kPackCount; ++j) {
        const int ahead = j * Share::kLanes;
        copy_async(tile + Shared::at(row, Share::pack() + ahead), source + ahead * kConvPack,
                   is_out && in_ + ahead * kConvPack < sizes.in);
      }
      source += int64_t{Share::kRowStep} * row_size_;
    }
  }

 private:
  using Share = CopyShare<Tile::kThreads, kConvDepth, Shared::kPacks>;

  int in_;
  int row_size_;
  const T* source_;
};

/// The gradient of y: a row per pixel, over which the weight's gradient sums, and a column per output channel.
template <typename Tile, typename T>
class GradientColumns {
 public:
  using Shared = OperandTile<Tile::kRows, true>;

  __device__ GradientColumns(const T* grad_y, const ConvSizes&, int first_out)
      : out_(first_out + Share::pack() * kConvPack), source_(grad_y + out_) {}

  __device__ void copy(unsigned char* tile, const ConvSizes& sizes, const PixelStep& step) const {
#pragma unroll
    for (int i = 0; i < Share::kRowCount; ++i) {
      const int row = Share::row() + i * Share::kRowStep;
      const int pixel = step.pixel + row;
      const T* source = source_ + int64_t{pixel} * sizes.out;
#pragma unroll
      for (int j = 0; j < Share::kPackCount; ++j) {
        const int ahead = j * Share::kLanes;
        copy_async(tile + Shared::at(row, Share::pack() + ahead), source + ahead * kConvPack,
                   pixel < sizes.pixels && out_ + ahead * kConvPack < sizes.out);
      }
    }
  }

 private:
  using Share = CopyShare<Tile::kThreads, kConvDepth, Shared::kPacks>;

  int out_;
  const T* source_;
};

/// Pixels as the taps see them: a row per pixel, over which the weight's gradient sums, and a column per tap and input
/// channel.
template <typename Tile, typename T>
class PixelColumns {
 public:
  using Shared = OperandTile<Tile::kColumns, true>;

  __device__ PixelColumns(const T* x, const ConvSizes& sizes, int first_column) : x_(x) {
#pragma unroll
    for (int j = 0; j < Share::kPackCount; ++j) {
      const int column = first_column + (Share::pack() + j * Share::kLanes) * kConvPack;
      const int tap = column / sizes.in;
      rows_[j] = tap / sizes.kernel_width - sizes.kernel_height / 2;
      columns_[j] = tap % sizes.kernel_width - sizes.kernel_width / 2;
      ahead_[j] = int64_t{rows_[j] * sizes.width + columns_[j]} * sizes.in + column % sizes.in;
      if (tap >= sizes.kernel_height * sizes.kernel_width) rows_[j] = sizes.height;  // inside no image
    }
  }

  __device__ void copy(unsigned char* tile, const ConvSizes& sizes, const PixelStep& step) const {
#pragma unroll
    for (int i = 0; i < Share::kRowCount; ++i) {
      const int row = Share::row() + i * Share::kRowStep;
      const int pixel = step.pixel + row;
      const PixelPlace place = place_of(sizes, pixel);
      const T* source = x_ + int64_t{pixel} * sizes.in;
#pragma unroll
      for (int j = 0; j < Share::kPackCount; ++j) {
        copy_async(tile + Shared::at(row, Share::pack() + j * Share::kLanes), source + ahead_[j],
                   pixel < sizes.pixels && is_inside(sizes, place, rows_[j], columns_[j]));
      }
    }
  }

 private:
  using Share = CopyShare<Tile::kThreads, kConvDepth, Shared::kPacks>;

  const T* x_;
  int rows_[Share::kPackCount];  // from a pixel to the one that the tap sees
  int columns_[Share::kPackCount];
  int64_t ahead_[Share::kPackCount];  // elements to its channel
};

/// Rows of pixels of an MP-Cat's halves, for a filter of one tap. A step lies in one half.
template <typename Tile, typename T>
class HalvesRows {
 public:
  using Shared = OperandTile<Tile::kRows, false>;

  __device__ HalvesRows(const T* a, const CatHalves<T>& halves, int first_pixel)
      : a_(a), halves_(halves), pixel_(first_pixel + Share::row()) {}

  __device__ void copy(unsigned char* tile, const ConvSizes& sizes, const FilterStep& step) const {
    const bool in_b = step.channel >= halves_.in_a;
    const int channels = in_b ? sizes.in - halves_.in_a : halves_.in_a;
    const int channel = (in_b ? step.channel - halves_.in_a : step.channel) + Share::pack() * kConvPack;
    const T* source = (in_b ? halves_.b : a_) + (int64_t{pixel_} * channels + channel);
#pragma unroll
    for (int i = 0; i < Share::kRowCount; ++i) {
      copy_async(tile + Shared::at(Share::row() + i * Share::kRowStep, Share::pack()),
                 source + int64_t{i} * Share::kRowStep * channels, pixel_ + i * Share::kRowStep < sizes.pixels);
    }
  }

 private:
  using Share = CopyShare<Tile::kThreads, Tile::kRows, Shared::kPacks>;

  const T* a_;
  const CatHalves<T>& halves_;
  int pixel_;
};

/// The same for the weight's gradient: a row per pixel, over which it sums, and a column per channel.
template <typename Tile, typename T>
class HalvesColumns {
 public:
  using Shared = OperandTile<Tile::kColumns, true>;

  __device__ HalvesColumns(const T* a, const CatHalves<T>& halves, const ConvSizes& sizes, int first_column) {
#pragma unroll
    for (int j = 0; j < Share::kPackCount; ++j) {
      const int column = first_column + (Share::pack() + j * Share::kLanes) * kConvPack;
      const bool in_b = column >= halves.in_a;
      sources_[j] = in_b ? halves.b + (column - halves.in_a) : a + column;
      channels_[j] = in_b ? sizes.in - halves.in_a : halves.in_a;
      ends_[j] = column < sizes.in ? sizes.pixels : 0;
    }
  }

  __device__ void copy(unsigned char* tile, const ConvSizes&, const PixelStep& step) const {
#pragma unroll
    for (int i = 0; i < Share::kRowCount; ++i) {
      const int row = Share::row() + i * Share::kRowStep;
      const int pixel = step.pixel + row;
#pragma unroll
      for (int j = 0; j < Share::kPackCount; ++j) {
        copy_async(tile + Shared::at(row, Share::pack() + j * Share::kLanes),
                   sources_[j] + int64_t{pixel} * channels_[j], pixel < ends_[j]);
      }
    }
  }

 private:
  using Share = CopyShare<Tile::kThreads, kConvDepth, Shared::kPacks>;

  const T* sources_[Share::kPackCount];  // at the first pixel
  int channels_[Share::kPackCount];      // of the half
  int ends_[Share::kPackCount];          // pixels, none beyond the last channel
};

template <ConvDirection Direction, bool Cat, typename Tile, typename T>
struct Operands;

template <typename Tile, typename T>
struct Operands<ConvDirection::kForward, false, Tile, T> {
  using Step = FilterStep;
  PixelRows<Tile, T> a;
  FilterRows<Tile, T> b;

  __device__ Operands(const ConvArguments<T>& args, int row, int column)
      : a(args.a, args.sizes, args.sizes.in, row), b(args.b, args.sizes, column) {}
};

template <typename Tile, typename T>
struct Operands<ConvDirection::kForward, true, Tile, T> {
  using Step = FilterStep;
  HalvesRows<Tile, T> a;
  FilterRows<Tile, T> b;

  __device__ Operands(const ConvArguments<T>& args, int row, int column)
      : a(args.a, args.halves, row), b(args.b, args.sizes, column) {}
};

template <typename Tile, typename T>
struct Operands<ConvDirection::kBackwardInput, false, Tile, T> {
  using Step = FilterStep;
  PixelRows<Tile, T> a;
  FilterColumns<Tile, T> b;

  __device__ Operands(const ConvArguments<T>& args, int row, int column)
      : a(args.a, args.sizes, args.sizes.out, row), b(args.b, args.sizes, column) {}
};

template <typename Tile, typename T>
struct Operands<ConvDirection::kBackwardWeight, false, Tile, T> {
  using Step = PixelStep;
  GradientColumns<Tile, T> a;
  PixelColumns<Tile, T> b;

  __device__ Operands(const ConvArguments<T>& args, int row, int column)
      : a(args.a, args.sizes, row), b(args.b, args.sizes, column) {}
};

template <typename Tile, typename T>
struct Operands<ConvDirection::kBackwardWeight, true, Tile, T> {
  using Step = PixelStep;
  GradientColumns<Tile, T> a;
  HalvesColumns<Tile, T> b;

  __device__ Operands(const ConvArguments<T>& args, int row, int column)
      : a(args.a, args.sizes, row), b(args.b, args.halves, args.sizes, column) {}
};

// ---- the product ----

/// This thread's share of a tile of sums: 16 x 8 pieces of its warp's part.
template <typename Tile>
struct Sums {
  static constexpr int kHigh = Tile::kWarpRows / 16;
  static constexpr int kWide = Tile::kWarpColumns / 8;
  float piece[kHigh][kWide][4];
};

template <typename Tile>
__device__ void scale(Sums<Tile>& sums, float by) {
#pragma unroll
  for (auto& row : sums.piece) {
#pragma unroll
    for (auto& piece : row) {
#pragma unroll
      for (float& sum : piece) sum *= by;
    }
  }
}

__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

/// First row and column of this thread's warp within a tile.
template <typename Tile>
__device__ int warp_row() {
  return warp_index() / Tile::kTile.warps_n * Tile::kWarpRows;
}
template <typename Tile>
__device__ int warp_column() {
  return warp_index() % Tile::kTile.warps_n * Tile::kWarpColumns;
}

/// The first operand of one step of the tensor cores, in registers.
template <typename Tile, typename Shared>
__device__ void load_rows(uint32_t (&a)[Sums<Tile>::kHigh][4], const unsigned char* tile, int depth) {
#pragma unroll
  for (int i = 0; i < Sums<Tile>::kHigh; ++i) {
    Shared::template load<false>(a[i], tile, warp_row<Tile>() + i * 16, depth);
  }
}

/// 16 columns of the second one.
template <typename Tile, typename Shared>
__device__ void load_columns(uint32_t (&b)[4], const unsigned char* tile, int j, int depth) {
  Shared::template load<true>(b, tile, warp_column<Tile>() + j * 16, depth);
}

__device__ inline unsigned char* shared_stages() {
  alignas(128) extern __shared__ unsigned char dynamic_shared[];
  return dynamic_shared;
}

/// Adds so many steps from `first` on to the sums. Afterwards nobody in the block reads shared memory any more, nor is
/// anything copied to it. Sums over an MP-Cat's channels want to be multiplied by the weight of the half that they end
/// in.
template <ConvDirection Direction, bool Cat, typename Tile, typename T>
__device__ void multiply_tiles(const ConvArguments<T>& args, int row, int column, int first, int count,
                               unsigned char* shared, Sums<Tile>& sums) {
  using Operands = Operands<Direction, Cat, Tile, T>;
  using SharedA = typename decltype(Operands::a)::Shared;
  using SharedB = typename decltype(Operands::b)::Shared;
  constexpr int kStageBytes = SharedA::kBytes + SharedB::kBytes;
  constexpr int kParts = kConvDepth / 16;
  static_assert(Tile::kStages * kStageBytes == Tile::kSharedBytes);

  const Operands operands(args, row, column);
  typename Operands::Step step(args.sizes, first);
  int copied = 0;
  int copy_stage = 0;
  // A group of copies per step, empty beyond the last, so that counting groups is counting steps.
  const auto copy_step = [&] {
    if (copied < count) {
      unsigned char* stage = shared + copy_stage * kStageBytes;
      operands.a.copy(stage, args.sizes, step);
      operands.b.copy(stage + SharedA::kBytes, args.sizes, step);
      step.advance(args.sizes);
    }
    commit_copies();
    ++copied;
    copy_stage = copy_stage + 1 < Tile::kStages ? copy_stage + 1 : 0;
  };

#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) copy_step();
  await_copies<Tile::kStages - 2>();
  __syncthreads();

  uint32_t a[2][Sums<Tile>::kHigh][4];
  uint32_t b[Sums<Tile>::kWide / 2][4];
  load_rows<Tile, SharedA>(a[0], shared, 0);
#pragma unroll
  for (int j = 0; j < Sums<Tile>::kWide / 2; ++j) load_columns<Tile, SharedB>(b[j], shared + SharedA::kBytes, j, 0);
  int stage = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    if constexpr (Cat && Direction == ConvDirection::kForward) {
      if ((first + i) * kConvDepth == args.halves.in_a) scale(sums, args.halves.a_to_b);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part == kParts - 1) {
        // The next step's operands are there, and all warps have read this one's: its stage may be copied to.
        await_copies<Tile::kStages - 2>();
        __syncthreads();
        stage = stage + 1 < Tile::kStages ? stage + 1 : 0;
      }
      const bool more = part < kParts - 1 || i + 1 < count;
      const int depth = (part + 1) % kParts * 16;
      const unsigned char* tile = shared + stage * kStageBytes;
      if (more) load_rows<Tile, SharedA>(a[(part + 1) % 2], tile, depth);
#pragma unroll
      for (int j = 0; j < Sums<Tile>::kWide / 2; ++j) {
#pragma unroll
        for (int k = 0; k < Sums<Tile>::kHigh; ++k) {
          multiply_add<T>(sums.piece[k][2 * j], a[part % 2][k], b[j][0], b[j][1]);
          multiply_add<T>(sums.piece[k][2 * j + 1], a[part % 2][k], b[j][2], b[j][3]);
        }
        if (more) load_columns<Tile, SharedB>(b[j], tile + SharedA::kBytes, j, depth);
      }
      if (part == 0) copy_step();  // now, when fewest registers are in use
    }
  }
}

/// Multiplies sums of an MP-Cat's halves by the halves' weights: those of the weight's gradient by column, others, over
/// steps up to `last`, by the half that they end in.
template <ConvDirection Direction, typename Tile, typename T>
__device__ void weigh_halves(const ConvArguments<T>& args, int column, int last, Sums<Tile>& sums) {
  const CatHalves<T>& halves = args.halves;
  if constexpr (Direction == ConvDirection::kBackwardWeight) {
#pragma unroll
    for (int j = 0; j < Sums<Tile>::kWide; ++j) {
      const float weight = column + warp_column<Tile>() + j * 8 < halves.in_a ? halves.weight_a : halves.weight_b;
#pragma unroll
      for (int i = 0; i < Sums<Tile>::kHigh; ++i) {
#pragma unroll
        for (float& sum : sums.piece[i][j]) sum *= weight;
      }
    }
  } else {
    scale(sums, last * kConvDepth <= halves.in_a ? halves.weight_a : halves.weight_b);
  }
}

// ---- results ----

template <typename T>
__device__ Floats<kConvPack> rounded(const Floats<kConvPack>& values) {
  return map([](float v) { return to_float(from_float<T>(v)); }, values);
}

/// Stores eight neighbouring sums of a row.
template <ConvDirection Direction, typename T>
__device__ void store_sums(const ConvArguments<T>& args, int row, int column, Floats<kConvPack> sums) {
  const int64_t at = int64_t{row} * args.columns + column;
  if constexpr (Direction == ConvDirection::kBackwardWeight) {
    store(args.grad_w + at, Floats<4>{sums.v[0], sums.v[1], sums.v[2], sums.v[3]});
    store(args.grad_w + at + 4, Floats<4>{sums.v[4], sums.v[5], sums.v[6], sums.v[7]});
  } else if constexpr (Direction == ConvDirection::kBackwardInput) {
    store(args.output.y + at, sums);
  } else {
    const ConvOutput<T>& output = args.output;
    if (output.epilogue == ConvEpilogue::kGain) sums = sums * *output.gain;
    if (output.y != nullptr) store(output.y + at, sums);
    if (output.epilogue == ConvEpilogue::kModulatedSiLU) {
      const int64_t sample = divide(row, output.by_pixels);
      const auto c = load<kConvPack>(output.c + sample * args.columns + column);
      store(output.out + at, mp_silu(rounded<T>(sums) * c));
    } else if (output.epilogue == ConvEpilogue::kSum) {
      const auto sum = load<kConvPack>(output.skip + at) * output.weight_skip + rounded<T>(sums) * output.weight_y;
      store(output.out + at, map([&](float v) { return math::clamp(v, output.clip); }, sum));
      static_assert(kConvPack == kMaskedTogether);
      if (output.mask != nullptr) output.mask[at / kConvPack] = static_cast<uint8_t>(within_bounds(sum, output.clip));
    }
  }
}

/// Stores eight neighbouring sums of a row, or their part `split` where there are several.
template <ConvDirection Direction, typename T>
__device__ void store_or_part(const ConvArguments<T>& args, int split, int row, int column, const Floats<4>& low,
                              const Floats<4>& high) {
  if (args.splits > 1) {
    float* target = args.parts + (int64_t{split} * args.rows + row) * args.columns + column;
    store(target, low);
    store(target + 4, high);
  } else {
    store_sums<Direction>(args, row, column,
                          {low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]});
  }
}

/// Sums on their way from the layout of the tensor cores to rows of 16 bytes, through shared memory: 16 rows of each
/// warp's at a time.
template <ConvDirection Direction, typename Tile, typename T>
__device__ void store_tile(const ConvArguments<T>& args, int row, int column, int split, unsigned char* shared,
                           const Sums<Tile>& sums) {
  constexpr int kPadded = Tile::kWarpColumns + 8;  // neighbouring rows in different banks
  constexpr int kPacks = Tile::kWarpColumns / kConvPack;
  static_assert(Tile::kThreads / kWarpSize * 16 * kPadded * 4 <= Tile::kSharedBytes);
  float* own = reinterpret_cast<float*>(shared) + warp_index() * 16 * kPadded;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i < Sums<Tile>::kHigh; ++i) {
#pragma unroll
    for (int j = 0; j < Sums<Tile>::kWide; ++j) {
      const float (&piece)[4] = sums.piece[i][j];
      float* target = own + lane / 4 * kPadded + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(target) = {piece[0], piece[1]};
      *reinterpret_cast<float2*>(target + 8 * kPadded) = {piece[2], piece[3]};
    }
    __syncwarp();
#pragma unroll
    for (int k = lane; k < 16 * kPacks; k += kWarpSize) {
      const int at_row = row + warp_row<Tile>() + i * 16 + k / kPacks;
      const int at_column = column + warp_column<Tile>() + k % kPacks * kConvPack;
      if (at_row >= args.rows || at_column >= args.columns) continue;
      const float* source = own + k / kPacks * kPadded + k % kPacks * kConvPack;
      store_or_part<Direction>(args, split, at_row, at_column, load<4>(source), load<4>(source + 4));
    }
    __syncwarp();
  }
}

/// The same where every tile is a head's q, k and v: 16 rows of all warps at a time, each finished by neighbouring
/// lanes as qkv_norm_rows does it.
template <typename Tile, typename T>
__device__ void store_heads(const ConvArguments<T>& args, int row, int column, unsigned char* shared,
                            const Sums<Tile>& sums) {
  constexpr int kPadded = Tile::kColumns + 8;
  constexpr int kLanes = kConvHead / kConvPack;  // of a row
  static_assert(Tile::kColumns == 3 * kConvHead && Tile::kThreads == 16 * Tile::kTile.warps_m * kLanes);
  static_assert(16 * Tile::kTile.warps_m * kPadded * 4 <= Tile::kSharedBytes);
  float* staged = reinterpret_cast<float*>(shared);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int staged_row = static_cast<int>(threadIdx.x) / kLanes;
  const int channel = lane % kLanes * kConvPack;
#pragma unroll
  for (int i = 0; i < Sums<Tile>::kHigh; ++i) {
    float* own = staged + warp_index() / Tile::kTile.warps_n * 16 * kPadded + warp_column<Tile>();
#pragma unroll
    for (int j = 0; j < Sums<Tile>::kWide; ++j) {
      const float (&piece)[4] = sums.piece[i][j];
      float* target = own + lane / 4 * kPadded + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(target) = {piece[0], piece[1]};
      *reinterpret_cast<float2*>(target + 8 * kPadded) = {piece[2], piece[3]};
    }
    __syncthreads();
    const int at_row = row + staged_row / 16 * Tile::kWarpRows + i * 16 + staged_row % 16;
    const bool is_row = at_row < args.rows;
    const float* source = staged + staged_row * kPadded + 3 * channel;
    Floats<kConvPack> parts[3];
#pragma unroll
    for (int pack = 0; pack < 3; ++pack) {
      const auto low = load<4>(source + pack * kConvPack);
      const auto high = load<4>(source + pack * kConvPack + 4);
      const auto y = rounded<T>({low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]});
      if (is_row && args.output.y != nullptr) {
        store(args.output.y + int64_t{at_row} * args.columns + column + 3 * channel + pack * kConvPack, y);
      }
#pragma unroll
      for (int k = 0; k < kConvPack; ++k) parts[(pack * kConvPack + k) % 3].v[(pack * kConvPack + k) / 3] = y.v[k];
    }
    const int64_t at = int64_t{at_row} * (args.columns / 3) + column / 3 + channel;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const float squares = sum_over_lanes(sum(parts[j] * parts[j]), kLanes);
      const float scale = inverse_pixel_scale(squares, static_cast<float>(kConvHead), args.output.eps);
      if (is_row) store(args.output.qkv[j] + at, parts[j] * scale);
    }
    __syncthreads();
  }
}

/// A block per split and tile; neighbours share rows. Cat: x is an MP-Cat's halves.
template <ConvDirection Direction, int TileIndex, bool Cat, typename T>
__global__ void __launch_bounds__(BlockTile<TileIndex>::kThreads, BlockTile<TileIndex>::kTile.blocks)
    mp_conv2d_tiles(const __grid_constant__ ConvArguments<T> args) {
  using Tile = BlockTile<TileIndex>;
  unsigned char* shared = shared_stages();
  const int wide = (args.columns + Tile::kColumns - 1) / Tile::kColumns;
  const int tiles = (args.rows + Tile::kRows - 1) / Tile::kRows * wide;
  const int block = static_cast<int>(blockIdx.x);
  const int split = block / tiles;
  const int row = block % tiles / wide * Tile::kRows;
  const int column = block % tiles % wide * Tile::kColumns;
  const auto first = static_cast<int>(int64_t{args.steps} * split / args.splits);
  const auto last = static_cast<int>(int64_t{args.steps} * (split + 1) / args.splits);
  Sums<Tile> sums = {};
  multiply_tiles<Direction, Cat>(args, row, column, first, last - first, shared, sums);
  if constexpr (Cat) {
    weigh_halves<Direction>(args, column, last, sums);
  } else if constexpr (Direction == ConvDirection::kForward && TileIndex == kConvQKVPlan.tile) {
    if (args.output.epilogue == ConvEpilogue::kQKVNorm) return store_heads<Tile>(args, row, column, shared, sums);
  }
  store_tile<Direction>(args, row, column, split, shared, sums);
}

/// Adds the parts of split sums, in order.
template <ConvDirection Direction, typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<>)
    mp_conv2d_add_parts(const __grid_constant__ ConvArguments<T> args) {
  const int64_t count = int64_t{args.rows} * args.columns;
  const int64_t packs = count / kConvPack;
  for (int64_t pack = blockIdx.x * int64_t{kThreads} + threadIdx.x; pack < packs;
       pack += gridDim.x * int64_t{kThreads}) {
    Floats<4> low = {};
    Floats<4> high = {};
    for (int split = 0; split < args.splits; ++split) {
      const float* part = args.parts + split * count + pack * kConvPack;
      low = low + load<4>(part);
      high = high + load<4>(part + 4);
    }
    const auto row = static_cast<int>(pack * kConvPack / args.columns);
    const auto column = static_cast<int>(pack * kConvPack % args.columns);
    store_sums<Direction>(args, row, column,
                          {low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]});
  }
}

}  // namespace edm2::cuda
