// The convolution kernels and launchers, for ctypes.
#include "cuda/mp_conv2d.cu"
#include "cuda/mp_conv2d_tiles.cu"

namespace {

using namespace edm2;

ConvShape shape_of(const int64_t* sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
}

ConvPlan plan_of(int64_t tile, int64_t splits) { return {static_cast<int>(tile), static_cast<int>(splits)}; }

}  // namespace

extern "C" {

int mp_conv2d(const void* x, const void* w, void* y, const int64_t* sizes, int dtype, int64_t tile, int64_t splits,
              float* workspace, int64_t epilogue, void* out, const float* gain, const void* c, const void* skip,
              double weight_skip, double weight_y, double clip, uint8_t* mask) {
  return cuda::launch_mp_conv2d(
      {x, w, y, shape_of(sizes), static_cast<DType>(dtype), plan_of(tile, splits), workspace,
       static_cast<ConvEpilogue>(epilogue), out, gain, c, skip, weight_skip, weight_y, clip, mask},
      nullptr);
}

/// The same with q, k and v for an output.
int mp_conv2d_qkv_norm(const void* x, const void* w, void* y, const int64_t* sizes, int dtype, int64_t tile,
                       int64_t splits, float* workspace, void* q, void* k, void* v, double eps) {
  MPConv2dParams params{
      x, w, y, shape_of(sizes), static_cast<DType>(dtype), plan_of(tile, splits), workspace, ConvEpilogue::kQKVNorm};
  params.qkv[0] = q;
  params.qkv[1] = k;
  params.qkv[2] = v;
  params.eps = eps;
  return cuda::launch_mp_conv2d(params, nullptr);
}

int mp_conv2d_backward_input(const void* grad_y, const void* w, void* grad_x, const int64_t* sizes, int dtype,
                             int64_t tile, int64_t splits, float* workspace) {
  return cuda::launch_mp_conv2d_backward_input(
      {grad_y, w, grad_x, shape_of(sizes), static_cast<DType>(dtype), plan_of(tile, splits), workspace}, nullptr);
}

int mp_conv2d_backward_weight(const void* grad_y, const void* x, float* grad_w, const int64_t* sizes, int dtype,
                              int64_t tile, int64_t splits, float* workspace) {
  return cuda::launch_mp_conv2d_backward_weight(
      {grad_y, x, grad_w, shape_of(sizes), static_cast<DType>(dtype), plan_of(tile, splits), workspace}, nullptr);
}

/// Of an MP-Cat's halves.
int mp_cat_conv2d(const void* a, const void* b, const void* w, void* y, const int64_t* sizes, int dtype, int64_t tile,
                  int64_t splits, float* workspace, int64_t epilogue, int64_t in_a, double weight_a, double weight_b) {
  MPConv2dParams params{a,
                        w,
                        y,
                        shape_of(sizes),
                        static_cast<DType>(dtype),
                        plan_of(tile, splits),
                        workspace,
                        static_cast<ConvEpilogue>(epilogue)};
  params.halves = {b, in_a, weight_a, weight_b};
  return cuda::launch_mp_conv2d(params, nullptr);
}

int mp_cat_conv2d_backward_weight(const void* grad_y, const void* a, const void* b, float* grad_w, const int64_t* sizes,
                                  int dtype, int64_t tile, int64_t splits, float* workspace, int64_t in_a,
                                  double weight_a, double weight_b) {
  return cuda::launch_mp_conv2d_backward_weight({grad_y,
                                                 a,
                                                 grad_w,
                                                 shape_of(sizes),
                                                 static_cast<DType>(dtype),
                                                 plan_of(tile, splits),
                                                 workspace,
                                                 {b, in_a, weight_a, weight_b}},
                                                nullptr);
}

/// The plan for a GPU with so many multiprocessors, as 1000 * tile + splits.
int64_t planned(int64_t direction, const int64_t* sizes, int64_t multiprocessors) {
  const ConvPlan plan =
      plan_conv(static_cast<ConvDirection>(direction), shape_of(sizes), static_cast<int>(multiprocessors));
  return 1000 * plan.tile + plan.splits;
}

/// Floats of workspace for a direction and plan.
int64_t workspace_floats(int64_t direction_, const int64_t* sizes, int64_t tile, int64_t splits) {
  const auto direction = static_cast<ConvDirection>(direction_);
  const ConvPlan plan = plan_of(tile, splits);
  return conv_workspace(conv_product(direction, shape_of(sizes), plan), plan);
}

int64_t tile_count() { return kConvTileCount; }

/// Rows (which: 0), columns (1), threads (2), shared memory in bytes (3) of a tile.
int64_t tile_size(int64_t tile, int64_t which) {
  const ConvTile& of = kConvTiles[tile];
  const int sizes[] = {of.rows, of.columns, of.threads(), conv_shared_bytes(of)};
  return sizes[which];
}

int64_t divided(int64_t number, int64_t divisor) {
  return divide(static_cast<int>(number), fast_divisor(static_cast<uint32_t>(divisor)));
}

int64_t taps_of(const int64_t* sizes, int64_t pixel) {
  return taps_inside(cuda::sizes_of(shape_of(sizes)), static_cast<int>(pixel));
}

int64_t pack_address(int64_t row, int64_t pack, int64_t packs) {
  return swizzled(static_cast<int>(row), static_cast<int>(pack), static_cast<int>(packs));
}

/// What the blocks of a Hopper GPU work on with tile 0 or 1: six numbers for each piece of work (first row, first and
/// last column, split, first step, steps). Returns how many pieces there are.
int64_t wgmma_works(int64_t direction_, const int64_t* sizes, int64_t tile, int64_t splits, int64_t* works) {
  const auto direction = static_cast<ConvDirection>(direction_);
  const ConvShape shape = shape_of(sizes);
  const ConvWgmmaTile size = conv_wgmma_tile(direction, static_cast<int>(tile));
  const ConvProduct product = conv_product(direction, shape, kConvWgmmaDepth);
  const int64_t of_tap = direction == ConvDirection::kBackwardWeight ? shape.in : product.columns;
  const int64_t column_tiles = product.columns / of_tap * conv_ceil_div(of_tap, size.columns);
  const int64_t row_pairs = conv_ceil_div(conv_ceil_div(product.rows, size.rows), kConvWgmmaBlocks);
  const int64_t pieces = conv_wgmma_works(direction, shape, static_cast<int>(tile)) * splits;
  for (int64_t i = 0; i < pieces * kConvWgmmaBlocks; ++i) {
    const WgmmaWork work = wgmma_work(static_cast<int>(i / kConvWgmmaBlocks), static_cast<int>(i % kConvWgmmaBlocks),
                                      kConvWgmmaBlocks, static_cast<int>(column_tiles), static_cast<int>(row_pairs),
                                      static_cast<int>(product.steps), static_cast<int>(splits));
    const WgmmaColumns columns = wgmma_columns(work.column_tile, size.columns, static_cast<int>(of_tap));
    const int64_t numbers[] = {
        int64_t{work.row_tile} * size.rows, columns.first, columns.last, work.split, work.first, work.count};
    std::copy(std::begin(numbers), std::end(numbers), works + 6 * i);
  }
  return pieces * kConvWgmmaBlocks;
}

/// Rows (which: 0), columns (1), stages (2) of a tile for Hopper, and bytes of its stages and of what stores it (3).
int64_t wgmma_tile_size(int64_t direction, int64_t tile, int64_t which) {
  const ConvWgmmaTile of = conv_wgmma_tile(static_cast<ConvDirection>(direction), static_cast<int>(tile));
  const int bytes = of.stages * (of.rows + of.columns) * kConvWgmmaDepth * 2 + 8 * 16 * kConvWgmmaPadded * 4;
  const int sizes[] = {of.rows, of.columns, of.stages, bytes};
  return sizes[which];
}

int64_t bank_conflicts() { return emulation::bank_counts.conflicts; }
int64_t bank_reads() { return emulation::bank_counts.reads; }
}
