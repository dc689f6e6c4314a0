#include "edm2/mp_sum.h"

#include <limits>

#include "table.h"

namespace edm2::bench {

void mp_sum(Table& table) {
  for (const Image& image : table.images()) {
    if (!image.channels_last) continue;  // the layout is the same to it
    const auto [numel, dtype] = std::pair(image.numel(), image.dtype);
    const int64_t groups = (numel + kMaskedTogether - 1) / kMaskedTogether;
    for (const bool clipped : {false, true}) {
      const std::string label = (clipped ? " clipped" : "") + image.label();
      const double clip = clipped ? 1.0 : std::numeric_limits<double>::infinity();
      const auto mask = [=](bool in) { return Buffer{clipped ? (groups + 3) / 4 : 0, DType::kFloat32, in}; };
      table.add(
          "mp_sum" + label, {image.in(), image.in(), image.out(), mask(false)},
          [=](const Pointers& p) {
            auto* const bits = clipped ? static_cast<uint8_t*>(p[3]) : nullptr;
            return MPSumParams{p[0], p[1], p[2], bits, numel, dtype, 0.92, 0.39, clip};
          },
          GPU(cuda::launch_mp_sum), CPU(cpu::mp_sum), groups);
      for (const bool two_users : {false, true}) {
        table.add(
            "mp_sum_backward" + std::string(two_users ? " of two users" : "") + label,
            {image.in(), {two_users ? numel : 0, dtype, true}, mask(true), image.out(), image.out()},
            [=](const Pointers& p) {
              const auto* const bits = clipped ? static_cast<const uint8_t*>(p[2]) : nullptr;
              const void* const more = two_users ? p[1] : nullptr;
              return MPSumBackwardParams{p[0], more, bits, p[3], p[4], numel, dtype, 0.92, 0.39};
            },
            GPU(cuda::launch_mp_sum_backward), CPU(cpu::mp_sum_backward), groups);
      }
    }
  }
}

}  // namespace edm2::bench
