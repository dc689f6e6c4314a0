#include "edm2/resample.h"

#include "table.h"

namespace edm2::bench {

/// Down and up with the 2 x 2 filter, and down with one of four taps.
void resample(Table& table) {
  static const double kTwo[] = {0.5, 0.5};
  static const double kFour[] = {0.125, 0.375, 0.375, 0.125};
  for (const Image& image : table.images()) {
    const Image half{image.batch, image.channels, image.height / 2, image.width / 2, image.channels_last, image.dtype};
    const auto work = [](const Image& of) { return of.channels_last ? of.batch * of.height : of.batch * of.channels; };
    const auto params = [](const Image& x, const Image& y, const Pointers& p, const double* filter, int64_t taps) {
      return ResampleParams{p[0],     p[1],    x.batch,         x.channels, x.height, x.width,
                            y.height, y.width, x.channels_last, x.dtype,    filter,   taps};
    };
    for (const int64_t taps : {2, 4}) {
      const double* filter = taps == 2 ? kTwo : kFour;
      const std::string suffix = taps == 2 ? "" : "_4_taps";
      table.add(
          "resample_down" + suffix + image.label(), {image.in(), half.out()},
          [=](const Pointers& p) { return params(image, half, p, filter, taps); }, GPU(cuda::launch_resample_down),
          CPU(cpu::resample_down), work(half));
      table.add(
          "resample_up" + suffix + half.label(), {half.in(), image.out()},
          [=](const Pointers& p) { return params(half, image, p, filter, taps); }, GPU(cuda::launch_resample_up),
          CPU(cpu::resample_up), work(image));
    }
  }
}

}  // namespace edm2::bench
