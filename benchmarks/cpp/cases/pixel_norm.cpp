#include "edm2/pixel_norm.h"

#include "table.h"

namespace edm2::bench {

void pixel_norm(Table& table) {
  for (const Image& image : table.images()) {
    const int64_t pixels = image.batch * image.height * image.width;
    for (const bool silu : {false, true}) {
      const std::string suffix = (silu ? "_silu" : "");
      std::vector<Buffer> forward{image.in(), image.out()};
      std::vector<Buffer> backward{image.in(), image.in(), image.out()};
      if (silu) {
        forward.push_back(image.out());
        backward.push_back(image.in());
      }
      table.add(
          "pixel_norm" + suffix + image.label(), forward,
          [=](const Pointers& p) {
            return PixelNormParams{p[0], p[1], silu ? p[2] : nullptr, image.shape(), image.dtype, kEps};
          },
          GPU(cuda::launch_pixel_norm), CPU(cpu::pixel_norm), pixels);
      table.add(
          "pixel_norm" + suffix + "_backward" + image.label(), backward,
          [=](const Pointers& p) {
            return PixelNormBackwardParams{p[0], silu ? p[3] : nullptr, p[1], p[2], image.shape(), image.dtype, kEps};
          },
          GPU(cuda::launch_pixel_norm_backward), CPU(cpu::pixel_norm_backward), pixels);
    }
  }
}

}  // namespace edm2::bench
