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

/// Elements brought side by side at a time, so that they can be computed with as vectors.
constexpr int64_t kTogether = 256;

/// `count` elements `step` apart: where they are if that is side by side, else copied.
template <class T>
EDM2_FORMULA const T* together(const T* from, int64_t step, T* copies, int64_t count) {
  if (step == 1) return from;
  for (int64_t i = 0; i < count; ++i) copies[i] = from[i * step];
  return copies;
}

/// The way back.
template <class T>
EDM2_FORMULA void apart(const T* row, T* to, int64_t step, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i * step] = row[i];
}

/// y = x * factor.
template <class T>
void scale(const Compute<T>* x, int64_t x_step, T* y, int64_t y_step, Compute<T> factor, int64_t count) {
  Compute<T> x_row[kTogether];
  T y_row[kTogether];
  for (int64_t at = 0; at < count; at += kTogether) {
    const int64_t here = min(kTogether, count - at);
    const Compute<T>* from = together(x + at * x_step, x_step, x_row, here);
    T* to = y_step == 1 ? y + at : y_row;
#pragma omp simd
    for (int64_t i = 0; i < here; ++i) to[i] = narrow<T>(from[i] * factor);
    if (y_step != 1) apart(y_row, y + at * y_step, y_step, here);
  }
}

}  // namespace
}  // namespace edm2::cpu::EDM2_CPU_ISA
