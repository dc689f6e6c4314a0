#include "edm2/mp_cat.h"

#include "table.h"

namespace edm2::bench {

/// Two thirds of the channels come from a.
void mp_cat(Table& table) {
  for (const Image& image : table.images()) {
    const int64_t channels_a = image.channels / 3 * 2;
    const int64_t channel_size = image.channels_last ? 1 : image.height * image.width;
    const int64_t rows = image.numel() / (image.channels * channel_size);
    const int64_t size_a = channels_a * channel_size;
    const int64_t size_b = image.channels * channel_size - size_a;
    const auto dtype = image.dtype;
    for (const bool silu : {false, true}) {
      const std::string label = (silu ? "_silu" : "");
      std::vector<Buffer> forward{{rows * size_a, dtype, true}, {rows * size_b, dtype, true}, image.out()};
      std::vector<Buffer> backward{image.in(), {rows * size_a, dtype, false}, {rows * size_b, dtype, false}};
      if (silu) {
        forward.push_back(image.out());
        backward.push_back(image.in());
        backward.push_back(image.in());
      }
      table.add(
          "mp_cat" + label + image.label(), forward,
          [=](const Pointers& p) {
            return MPCatParams{p[0], p[1], p[2], silu ? p[3] : nullptr, rows, size_a, size_b, dtype, 0.9, 1.2};
          },
          GPU(cuda::launch_mp_cat), CPU(cpu::mp_cat), image.numel());
      table.add(
          "mp_cat" + label + "_backward" + image.label(), backward,
          [=](const Pointers& p) {
            return MPCatBackwardParams{
                p[0], silu ? p[3] : nullptr, silu ? p[4] : nullptr, p[1], p[2], rows, size_a, size_b, dtype, 0.9, 1.2};
          },
          GPU(cuda::launch_mp_cat_backward), CPU(cpu::mp_cat_backward), image.numel());
    }
  }
}

}  // namespace edm2::bench
