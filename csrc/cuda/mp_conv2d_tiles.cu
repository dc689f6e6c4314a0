// One tile of one direction of the convolution, for both dtypes. Compiled once per combination, with
// EDM2_CONV_DIRECTION, EDM2_CONV_TILE and, whether x is an MP-Cat's halves, EDM2_CONV_CAT (CMakeLists.txt): the kernels
// take longest of all to compile.
#include "mp_conv2d.h"

namespace edm2::cuda {

template <ConvDirection Direction, int Tile, bool Cat, typename T>
cudaError_t launch_conv_tiles(const ConvArguments<T>& args, cudaStream_t stream, Traffic traffic) {
  constexpr ConvTile kTile = kConvTiles[Tile];
  const int64_t blocks = conv_tiles({args.rows, args.columns, args.steps}, kTile) * args.splits;
  return launch_blocks(conv_shared_bytes(kTile), mp_conv2d_tiles<Direction, Tile, Cat, T>, blocks, kTile.threads(),
                       stream, traffic, args);
}

#if defined(EDM2_CONV_DIRECTION)
template cudaError_t launch_conv_tiles<ConvDirection::EDM2_CONV_DIRECTION, EDM2_CONV_TILE, EDM2_CONV_CAT>(
    const ConvArguments<__half>&, cudaStream_t, Traffic);
template cudaError_t launch_conv_tiles<ConvDirection::EDM2_CONV_DIRECTION, EDM2_CONV_TILE, EDM2_CONV_CAT>(
    const ConvArguments<__nv_bfloat16>&, cudaStream_t, Traffic);
#endif

}  // namespace edm2::cuda
