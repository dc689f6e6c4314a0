#include "edm2/mp_conv2d.h"

#include <algorithm>
#include <iterator>

#include "edm2/mp_conv2d_plan.h"

/// For ctypes: the plan for a convolution (batch, height, width, in, out, kernel height and width; direction 0:
/// forward, 1: gradient of the input, 2: of the weight) on a GPU with so many multiprocessors, `wgmma`: on Hopper's
/// tensor cores. Result: rows and columns of its tiles, blocks' pieces of work, splits, steps of one, their depth,
/// blocks that a multiprocessor has room for, and the sums' rows and columns.
extern "C" __attribute__((visibility("default"))) void edm2_plan_conv(int direction_, const int64_t sizes[7],
                                                                      int multiprocessors, int wgmma,
                                                                      int64_t result[9]) {
  using namespace edm2;
  const auto direction = static_cast<ConvDirection>(direction_);
  const ConvShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  const int first = wgmma != 0 ? kConvTileCount : 0;
  const ConvPlan plan = plan_conv(direction, shape, multiprocessors, first,
                                  wgmma != 0 ? kConvTileCount + kConvWgmmaTileCount : kConvTileCount);
  const ConvProduct product = conv_product(direction, shape, plan);
  ConvTile tile = kConvTiles[plan.tile - first];
  int64_t pieces = conv_tiles(product, tile);
  if (wgmma != 0) {
    const ConvWgmmaTile large = conv_wgmma_tile(direction, plan.tile - first);
    tile.rows = large.rows;
    tile.columns = large.columns;
    tile.blocks = 1;
    pieces = conv_wgmma_works(direction, shape, plan.tile - first) * kConvWgmmaBlocks;
  }
  const int64_t answers[] = {tile.rows,
                             tile.columns,
                             pieces * plan.splits,
                             plan.splits,
                             conv_ceil_div(product.steps, plan.splits),
                             wgmma != 0 ? kConvWgmmaDepth : kConvDepth,
                             tile.blocks,
                             product.rows,
                             product.columns};
  std::copy(std::begin(answers), std::end(answers), result);
}

/// For ctypes: whether the library holds the convolutions for Hopper's tensor cores.
extern "C" __attribute__((visibility("default"))) int edm2_has_conv_wgmma() {
#if defined(EDM2_CONV_WGMMA)
  return 1;
#else
  return 0;
#endif
}

/// For ctypes: plans worth trying, for every tile the likeliest, as pairs of tile and splits; `wgmma`: those for Hopper
/// too. There is room for kConvTried of each tile. Returns how many there are.
extern "C" __attribute__((visibility("default"))) int edm2_conv_plans(int direction, const int64_t sizes[7],
                                                                      int multiprocessors, int wgmma,
                                                                      int64_t result[]) {
  using namespace edm2;
  const ConvShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  int count = 0;
  for (int tile = 0; tile < kConvTileCount + (wgmma != 0 ? kConvWgmmaTileCount : 0); ++tile) {
    ConvPlan plans[kConvTried];
    const int found = conv_plans_to_try(static_cast<ConvDirection>(direction), shape, tile, multiprocessors, plans);
    for (int i = 0; i < found; ++i, ++count) {
      result[2 * count] = plans[i].tile;
      result[2 * count + 1] = plans[i].splits;
    }
  }
  return count;
}
