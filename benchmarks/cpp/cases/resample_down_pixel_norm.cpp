#include "edm2/resample_down_pixel_norm.h"

#include "table.h"

namespace edm2::bench {

void resample_down_pixel_norm(Table& table) {
  for (const Image& image : table.images()) {
    const auto& [batch, channels, height, width, channels_last, dtype] = image;
    const Image half{batch, channels, height / 2, width / 2, channels_last, dtype};
    const Buffer rms{batch * half.height * half.width, DType::kFloat32, true};
    table.add(
        "resample_down_pixel_norm" + image.label(), {image.in(), half.out(), half.out(), rms},
        [=](const Pointers& p) {
          return ResampleDownPixelNormParams{p[0],         p[1],        p[2],
                                             p[3],         image.batch, image.channels,
                                             image.height, image.width, image.channels_last,
                                             image.dtype,  kEps};
        },
        GPU(cuda::launch_resample_down_pixel_norm), CPU(cpu::resample_down_pixel_norm),
        cpu::halving_items(image, false));
    table.add(
        "resample_down_pixel_norm_backward" + image.label(), {half.in(), half.in(), half.in(), rms, image.out()},
        [=](const Pointers& p) {
          return ResampleDownPixelNormBackwardParams{p[0],           p[1],
                                                     p[2],           p[3],
                                                     p[4],           image.batch,
                                                     image.channels, image.height,
                                                     image.width,    image.channels_last,
                                                     image.dtype,    kEps};
        },
        GPU(cuda::launch_resample_down_pixel_norm_backward), CPU(cpu::resample_down_pixel_norm_backward),
        cpu::halving_items(image, true));
  }
}

}  // namespace edm2::bench
