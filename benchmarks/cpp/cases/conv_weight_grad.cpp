#include "edm2/conv_weight_grad.h"

#include "table.h"

namespace edm2::bench {

/// Of a CPU, in fp32: 3 x 3 filters with as many channels out as in.
void conv_weight_grad(Table& table) {
  for (const Image& image : table.images()) {
    if (!image.channels_last || image.dtype != DType::kFloat32 || image.channels % kConvLanes != 0) continue;
    constexpr int64_t kSize = 3;
    const int64_t channels = image.channels;
    const int64_t items = kSize * kSize * conv_tiles(channels, kConvTileOut) * conv_tiles(channels, kConvTileIn);
    const auto floats = [](int64_t numel) { return Buffer{numel, DType::kFloat32, false}; };
    table.add(
        "conv_weight_grad" + image.label(),
        {image.in(), image.in(), floats(channels * channels * kSize * kSize),
         floats(items * kConvTileOut * kConvTileIn)},
        [=](const Pointers& p) {
          const auto at = [&](int i) { return static_cast<float*>(p[static_cast<size_t>(i)]); };
          return ConvWeightGradParams{at(0),        at(1),       false,    at(2),    at(3), image.batch,
                                      image.height, image.width, channels, channels, kSize};
        },
        nullptr, CPU(cpu::conv_weight_grad), items);
    table.cases.back().products = image.numel() * channels * kSize * kSize;
  }
}

}  // namespace edm2::bench
