#include "edm2/mp_conv2d.h"

#include <algorithm>
#include <iterator>

#include "edm2/mp_conv2d_plan.h"

/// For ctypes: the plan for a convolution (batch, height, width, in, out, kernel height and width; direction 0:
/// forward, 1: gradient of the input, 2: of the weight) on a GPU with so many multiprocessors. Result: rows and columns
/// of its tiles, blocks, splits, steps of a block, blocks that a multiprocessor has room for, and the sums' rows and
/// columns.
extern "C" __attribute__((visibility("default"))) void edm2_plan_conv(int direction_, const int64_t sizes[7],
                                                                      int multiprocessors, int64_t result[8]) {
  using namespace edm2;
  const auto direction = static_cast<ConvDirection>(direction_);
  const ConvShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
  const ConvProduct product = conv_product(direction, shape);
  const ConvPlan plan = plan_conv(direction, shape, multiprocessors);
  const ConvTile& tile = kConvTiles[plan.tile];
  const int64_t answers[] = {tile.rows,
                             tile.columns,
                             conv_tiles(product, tile) * plan.splits,
                             plan.splits,
                             conv_ceil_div(product.steps, plan.splits),
                             tile.blocks,
                             product.rows,
                             product.columns};
  std::copy(std::begin(answers), std::end(answers), result);
}
