#include "edm2/resample.h"

#include <cstdlib>

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

/// Memory of the call's own.
template <class C>
struct Scratch {
  C* data;
  explicit Scratch(int64_t size) : data(static_cast<C*>(std::malloc(static_cast<size_t>(size) * sizeof(C)))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

/// What output position `out` of one axis is made of: x[index] times filter[tap] for tap = first, first + step, ...,
/// last.
struct Taps {
  int64_t first;
  int64_t last;
  int64_t step;
  int64_t base;  // index = (base + direction * tap) / divisor

  bool up;
  int64_t index(int64_t tap) const { return up ? (base - tap) / 2 : base + tap; }
};

/// down: out takes x[2 * out + k - p]; up: x[(out + p - k) / 2] for the k that make it whole.
Taps taps_of(bool up, int64_t out, int64_t taps, int64_t size) {
  const int64_t pad = (taps - 1) / 2;
  if (up) {
    const int64_t base = out + pad;
    int64_t first = max(base - 2 * (size - 1), 0);
    first += (base - first) & 1;
    return {first, min(taps - 1, base), 2, base, true};
  }
  const int64_t base = 2 * out - pad;
  return {max(0, -base), min(taps - 1, size - 1 - base), 1, base, false};
}

/// Any filter, channels_last: one output row.
template <class T>
void any_filter_row(const ResampleParams& p, bool up, int64_t item, Compute<T>* __restrict sum) {
  const int64_t sample = item / p.out_height;
  const int64_t channels = p.channels;
  const T* x = as<T>(p.x) + sample * p.height * p.width * channels;
  T* y = as<T>(p.y) + item * p.out_width * channels;
  const Taps rows = taps_of(up, item % p.out_height, p.taps, p.height);
  for (int64_t ox = 0; ox < p.out_width; ++ox, y += channels) {
    const Taps columns = taps_of(up, ox, p.taps, p.width);
    for (int64_t c = 0; c < channels; ++c) sum[c] = 0;
    for (int64_t ky = rows.first; ky <= rows.last; ky += rows.step) {
      for (int64_t kx = columns.first; kx <= columns.last; kx += columns.step) {
        const T* __restrict from = x + (rows.index(ky) * p.width + columns.index(kx)) * channels;
        const Compute<T> weight = static_cast<Compute<T>>(p.filter[ky] * p.filter[kx]);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) sum[c] += weight * widen(from[c]);
      }
    }
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) y[c] = narrow<T>(sum[c]);
  }
}

/// Any filter, NCHW: one plane, first along columns of pixels into a padded row, then along the row.
template <class T>
void any_filter_plane(const ResampleParams& p, bool up, int64_t item, Compute<T>* __restrict padded) {
  using C = Compute<T>;
  const T* x = as<T>(p.x) + item * p.height * p.width;
  T* y = as<T>(p.y) + item * p.out_height * p.out_width;
  const int64_t pad = p.taps;
  C* __restrict sum = padded + pad;
  for (int64_t i = 0; i < p.width + 2 * pad; ++i) padded[i] = 0;
  for (int64_t oy = 0; oy < p.out_height; ++oy, y += p.out_width) {
    for (int64_t i = 0; i < p.width; ++i) sum[i] = 0;
    const Taps rows = taps_of(up, oy, p.taps, p.height);
    for (int64_t k = rows.first; k <= rows.last; k += rows.step) {
      const T* __restrict from = x + rows.index(k) * p.width;
      const C weight = static_cast<C>(p.filter[k]);
#pragma omp simd
      for (int64_t i = 0; i < p.width; ++i) sum[i] += weight * widen(from[i]);
    }
    const int64_t half = (p.taps - 1) / 2;
    if (up) {
      for (int64_t phase = 0; phase < 2; ++phase) {
        const int64_t first = (phase + half) & 1;
        const int64_t size = (p.out_width - phase + 1) / 2;
        for (int64_t m = 0; m < size; ++m) {
          C v = 0;
          for (int64_t k = first; k < p.taps; k += 2) {
            const int64_t i = m + (phase + half - k) / 2;
            if (i < p.width) v += static_cast<C>(p.filter[k]) * sum[i];
          }
          y[2 * m + phase] = narrow<T>(v);
        }
      }
    } else {
      for (int64_t ox = 0; ox < p.out_width; ++ox) {
        C v = 0;
        for (int64_t k = 0; k < p.taps; ++k) v += static_cast<C>(p.filter[k]) * sum[2 * ox + k - half];
        y[ox] = narrow<T>(v);
      }
    }
  }
}

template <class T>
void any_filter(const ResampleParams& p, bool up, int64_t begin, int64_t end) {
  const Scratch<Compute<T>> scratch(p.channels_last ? p.channels : p.width + 2 * p.taps);
  for (int64_t item = begin; item < end; ++item) {
    if (p.channels_last) {
      any_filter_row<T>(p, up, item, scratch.data);
    } else {
      any_filter_plane<T>(p, up, item, scratch.data);
    }
  }
}

}  // namespace

void resample_down(const ResampleParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) { any_filter<T>(p, false, begin, end); });
}

void resample_up(const ResampleParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) { any_filter<T>(p, true, begin, end); });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
