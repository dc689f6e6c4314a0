#include "edm2/mp_sum.h"

#include <limits>

#include "table.h"

namespace edm2::bench {

void mp_sum(Table& table) {
  for (const Image& image : table.images()) {
    if (!image.channels_last) continue;  // the layout is the same to it
    const auto [numel, dtype] = std::pair(image.numel(), image.dtype);
    for (const double clip : {std::numeric_limits<double>::infinity(), 1.0}) {
      const std::string label = (clip == 1.0 ? " clipped" : "") + image.label();
      table.add(
          "mp_sum" + label, {image.in(), image.in(), image.out()},
          [=](const Pointers& p) { return MPSumParams{p[0], p[1], p[2], numel, dtype, 0.92, 0.39, clip}; },
          GPU(cuda::launch_mp_sum), CPU(cpu::mp_sum), numel);
      table.add(
          "mp_sum_backward" + label, {image.in(), image.in(), image.in(), image.out(), image.out()},
          [=](const Pointers& p) {
            return MPSumBackwardParams{p[0], p[1], p[2], p[3], p[4], numel, dtype, 0.92, 0.39, clip};
          },
          GPU(cuda::launch_mp_sum_backward), CPU(cpu::mp_sum_backward), numel);
    }
  }
}

}  // namespace edm2::bench
