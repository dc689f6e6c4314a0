// Launching the convolution kernels. Host code.
#pragma once

#include "launch.h"
#include "mp_conv2d.cuh"

namespace edm2::cuda {

/// Starts mp_conv2d_tiles<Direction, Tile, Cat, T>. Each is compiled on its own (mp_conv2d_tiles.cu).
template <ConvDirection Direction, int Tile, bool Cat, typename T>
cudaError_t launch_conv_tiles(const ConvArguments<T>& args, cudaStream_t stream, Traffic traffic);

/// Starts mp_conv2d_wgmma<Direction, Tile, T>: the same on Hopper (mp_conv2d_wgmma.cu). args.steps are of
/// kConvWgmmaDepth.
template <ConvDirection Direction, int Tile, typename T>
cudaError_t launch_conv_wgmma(const ConvShape& shape, const ConvArguments<T>& args, cudaStream_t stream,
                              Traffic traffic);

}  // namespace edm2::cuda
