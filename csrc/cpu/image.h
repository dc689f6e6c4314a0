// Images [channels, pixels] of two layouts side by side: what kernels that change the layout on the way share.
#pragma once

#include "edm2/noise_level.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// One sample in its layout.
struct Image {
  int64_t channels;
  int64_t pixels;
  bool channels_last;

  int64_t numel() const { return channels * pixels; }
  int64_t at(int64_t channel, int64_t pixel) const {
    return channels_last ? pixel * channels + channel : channel * pixels + pixel;
  }
  /// From a pixel to the next one.
  int64_t step() const { return channels_last ? channels : 1; }
};

/// Cuts pixels [begin, end) of all samples into runs within one: f(sample, first pixel, number of pixels).
template <class F>
EDM2_FORMULA void for_samples(int64_t pixels, int64_t begin, int64_t end, const F& f) {
  for (int64_t at = begin; at < end;) {
    const int64_t sample = at / pixels, first = at % pixels;
    const int64_t count = min(pixels - first, end - at);
    f(sample, first, count);
    at += count;
  }
}

}  // namespace
}  // namespace edm2::cpu::EDM2_CPU_ISA
