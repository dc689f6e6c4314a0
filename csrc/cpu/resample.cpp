#include "edm2/resample.h"

#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

// ---- Filter (1, 1): sums of 2 x 2 pixels, copies to 2 x 2 pixels ----

constexpr int64_t kFlat = 1024;

/// y[j] = weight * (sum of the 2 x 2 pixels at 2 * j), `rows` output rows of one image, NCHW. Sums of row pairs go to a
/// flat buffer, so that sums of column pairs are one long loop however narrow the image.
template <class T>
void mean_rows(const T* __restrict x, T* __restrict y, int64_t rows, int64_t width, int64_t out_width,
               Compute<T> weight) {
  alignas(64) Compute<T> flat[kFlat];
  const int64_t used = 2 * out_width;
  for (int64_t first = 0; first < used; first += kFlat) {
    const int64_t columns = min(kFlat, used - first);
    const int64_t step = columns == used ? kFlat / columns : 1;  // rows at a time
    for (int64_t row = 0; row < rows; row += step) {
      const int64_t count = min(step, rows - row);
      for (int64_t r = 0; r < count; ++r) {
        const T* __restrict top = x + 2 * (row + r) * width + first;
        const T* __restrict bottom = top + width;
        Compute<T>* __restrict sum = flat + r * columns;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) sum[i] = widen(top[i]) + widen(bottom[i]);
      }
      T* __restrict out = y + row * out_width + first / 2;
#pragma omp simd
      for (int64_t i = 0; i < count * columns / 2; ++i) out[i] = narrow<T>(weight * (flat[2 * i] + flat[2 * i + 1]));
    }
  }
}

template <class T>
void mean_planes(const ResampleParams& p, int64_t begin, int64_t end) {
  const Compute<T> weight = static_cast<Compute<T>>(p.filter[0] * p.filter[0]);
  const int64_t plane = p.height * p.width;
  const int64_t out_plane = p.out_height * p.out_width;
  if (p.height == 2 * p.out_height) {  // planes follow each other as if they were one
    mean_rows(as<T>(p.x) + begin * plane, as<T>(p.y) + begin * out_plane, (end - begin) * p.out_height, p.width,
              p.out_width, weight);
    return;
  }
  for (int64_t item = begin; item < end; ++item) {
    mean_rows(as<T>(p.x) + item * plane, as<T>(p.y) + item * out_plane, p.out_height, p.width, p.out_width, weight);
  }
}

/// One output row, channels_last.
template <class T>
void mean_pixels(const ResampleParams& p, int64_t item) {
  const Compute<T> weight = static_cast<Compute<T>>(p.filter[0] * p.filter[0]);
  const int64_t channels = p.channels;
  const int64_t row = item / p.out_height * p.height + 2 * (item % p.out_height);
  const T* x = as<T>(p.x) + row * p.width * channels;
  T* y = as<T>(p.y) + item * p.out_width * channels;
  for (int64_t j = 0; j < p.out_width; ++j) {
    const T* __restrict left = x + 2 * j * channels;
    const T* __restrict right = left + channels;
    const T* __restrict below_left = left + p.width * channels;
    const T* __restrict below_right = below_left + channels;
    T* __restrict out = y + j * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      out[c] =
          narrow<T>(weight * ((widen(left[c]) + widen(right[c])) + (widen(below_left[c]) + widen(below_right[c]))));
    }
  }
}

/// Every pixel of a row twice, NCHW; Width is the width if known when compiling, else 0.
template <int Width, class T>
void spread_row(const T* __restrict x, T* __restrict y, int64_t width, Compute<T> weight) {
  const int64_t size = Width > 0 ? Width : width;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const T v = narrow<T>(weight * widen(x[i]));
    y[2 * i] = v;
    y[2 * i + 1] = v;
  }
}

template <int Width, class T>
void spread_plane(const ResampleParams& p, int64_t item) {
  const Compute<T> weight = static_cast<Compute<T>>(p.filter[0] * p.filter[0]);
  const int64_t out_width = Width > 0 ? 2 * Width : p.out_width;
  const T* x = as<T>(p.x) + item * p.height * p.width;
  T* y = as<T>(p.y) + item * p.out_height * p.out_width;
  for (int64_t row = 0; row < p.height; ++row, x += p.width, y += 2 * out_width) {
    spread_row<Width>(x, y, p.width, weight);
    if (p.out_width > 2 * p.width) y[2 * p.width] = T{};
    std::memcpy(y + out_width, y, static_cast<size_t>(out_width) * sizeof(T));
  }
  if (p.out_height > 2 * p.height) std::memset(y, 0, static_cast<size_t>(out_width) * sizeof(T));
}

/// One output row, channels_last.
template <class T>
void spread_pixels(const ResampleParams& p, int64_t item) {
  const Compute<T> weight = static_cast<Compute<T>>(p.filter[0] * p.filter[0]);
  const int64_t channels = p.channels;
  const int64_t row = item % p.out_height / 2;
  T* y = as<T>(p.y) + item * p.out_width * channels;
  if (row >= p.height) {
    std::memset(y, 0, static_cast<size_t>(p.out_width * channels) * sizeof(T));
    return;
  }
  const T* __restrict x = as<T>(p.x) + (item / p.out_height * p.height + row) * p.width * channels;
  for (int64_t i = 0; i < p.width; ++i, x += channels, y += 2 * channels) {
    T* __restrict left = y;
    T* __restrict right = y + channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const T v = narrow<T>(weight * widen(x[c]));
      left[c] = v;
      right[c] = v;
    }
  }
  if (p.out_width > 2 * p.width) std::memset(y, 0, static_cast<size_t>(channels) * sizeof(T));
}

// ---- Any filter: along columns into a padded row, then along the row. Taps: their number if known when compiling,
// else 0 ----

/// Working memory of a call: a row [taps + width + taps, channels], its padding zero, an output row, and a row of x of
/// zeros. NCHW: channels = 1.
template <class C>
struct Rows {
  int64_t channels;
  C* memory;
  C* row;
  C* out;
  C* zeros;

  explicit Rows(const ResampleParams& p) : channels(p.channels_last ? p.channels : 1) {
    const int64_t padded = (2 * p.taps + p.width) * channels;
    const int64_t size = padded + (p.out_width + p.width) * channels;
    memory = static_cast<C*>(std::calloc(static_cast<size_t>(size), sizeof(C)));
    row = memory + p.taps * channels;
    out = memory + padded;
    zeros = out + p.out_width * channels;
  }
  ~Rows() { std::free(memory); }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;
};

/// Which input the taps of an output position meet. Down: tap k meets input 2 * out + k - half. Up: tap k = phase,
/// phase + 2, ... meets input (out + half - k) / 2.
template <bool Up>
struct Axis {
  const double* filter;
  int64_t taps;
  static constexpr int64_t kStep = Up ? 2 : 1;
  int64_t half() const { return (taps - 1) / 2; }
  int64_t first(int64_t out) const { return Up ? (out + half()) & 1 : 0; }
  int64_t index(int64_t out, int64_t k) const { return Up ? (out + half() - k) >> 1 : 2 * out + k - half(); }
};

/// row = the weighted sum of the rows of x [height, size] that output row `out` is made of.
template <bool Up, class T>
void filter_columns(const Axis<Up>& axis, const T* x, int64_t height, int64_t size, int64_t out,
                    Compute<T>* __restrict row) {
  using C = Compute<T>;
  for (int64_t i = 0; i < size; ++i) row[i] = 0;
  for (int64_t k = axis.first(out); k < axis.taps; k += axis.kStep) {
    const int64_t index = axis.index(out, k);
    if (index < 0 || index >= height) continue;
    const T* __restrict from = x + index * size;
    const C weight = static_cast<C>(axis.filter[k]);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) row[i] += weight * widen(from[i]);
  }
}

/// y [out_width, channels] of the padded row [width, channels].
template <bool Up, class T>
void filter_row(const Axis<Up>& axis, const Rows<Compute<T>>& rows, T* __restrict y, int64_t out_width) {
  using C = Compute<T>;
  const int64_t channels = rows.channels;
  const int64_t size = out_width * channels;
  C* __restrict out = rows.out;
  for (int64_t i = 0; i < size; ++i) out[i] = 0;
  for (int64_t phase = 0; phase < axis.kStep; ++phase) {
    for (int64_t k = axis.first(phase); k < axis.taps; k += axis.kStep) {
      const C weight = static_cast<C>(axis.filter[k]);
      for (int64_t o = phase; o < out_width; o += axis.kStep) {
        const C* __restrict from = rows.row + axis.index(o, k) * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) out[o * channels + c] += weight * from[c];
      }
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(out[i]);
}

/// The same two steps for four taps: an output is made of four rows or columns (down), or of two (up), in one loop.
template <bool Up>
constexpr int kMet = Up ? 2 : 4;

template <bool Up, class T>
void filter_columns_of_4(const Axis<Up>& axis, const T* x, int64_t height, int64_t size, int64_t out,
                         const Rows<Compute<T>>& rows) {
  using C = Compute<T>;
  const T* from[kMet<Up>];
  C weight[kMet<Up>];
  for (int q = 0; q < kMet<Up>; ++q) {
    const int64_t k = axis.first(out) + q * axis.kStep;
    const int64_t index = axis.index(out, k);
    from[q] = index >= 0 && index < height ? x + index * size : static_cast<const T*>(static_cast<void*>(rows.zeros));
    weight[q] = static_cast<C>(axis.filter[k]);
  }
  C* __restrict row = rows.row;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    C v = 0;
    for (int q = 0; q < kMet<Up>; ++q) v += weight[q] * widen(from[q][i]);
    row[i] = v;
  }
}

template <bool Up, class T>
void filter_row_of_4(const Axis<Up>& axis, const Rows<Compute<T>>& rows, T* __restrict y, int64_t out_width) {
  using C = Compute<T>;
  const int64_t channels = rows.channels;
  C weight[axis.kStep][kMet<Up>];
  const C* from[axis.kStep][kMet<Up>];  // for the first output of either phase
  for (int64_t phase = 0; phase < axis.kStep; ++phase) {
    for (int q = 0; q < kMet<Up>; ++q) {
      const int64_t k = axis.first(phase) + q * axis.kStep;
      weight[phase][q] = static_cast<C>(axis.filter[k]);
      from[phase][q] = rows.row + axis.index(phase, k) * channels;
    }
  }
  constexpr int64_t kInStep = Up ? 1 : 2;
  const auto at = [&](int64_t phase, int64_t i) {
    C v = 0;
    for (int q = 0; q < kMet<Up>; ++q) v += weight[phase][q] * from[phase][q][i];
    return narrow<T>(v);
  };
  if (channels > 1) {
    for (int64_t o = 0; o < out_width; ++o) {
      const int64_t phase = o % axis.kStep;
      const int64_t shift = o / axis.kStep * kInStep * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) y[o * channels + c] = at(phase, shift + c);
    }
  } else if constexpr (Up) {
#pragma omp simd
    for (int64_t i = 0; i < out_width / 2; ++i) {
      y[2 * i] = at(0, i);
      y[2 * i + 1] = at(1, i);
    }
    if (out_width % 2 != 0) y[out_width - 1] = at(0, out_width / 2);
  } else {
#pragma omp simd
    for (int64_t o = 0; o < out_width; ++o) y[o] = at(0, 2 * o);
  }
}

template <bool Up, class T>
void any_filter(const ResampleParams& p, int64_t begin, int64_t end) {
  const Axis<Up> axis{p.filter, p.taps};
  const Rows<Compute<T>> rows(p);
  const int64_t size = p.width * rows.channels;
  const int64_t first = p.channels_last ? begin : begin * p.out_height;
  const int64_t last = p.channels_last ? end : end * p.out_height;
  for (int64_t number = first; number < last; ++number) {
    const int64_t row = number % p.out_height;
    const T* x = as<T>(p.x) + number / p.out_height * p.height * size;
    T* y = as<T>(p.y) + number * p.out_width * rows.channels;
    if (p.taps == 4) {
      filter_columns_of_4(axis, x, p.height, size, row, rows);
      filter_row_of_4(axis, rows, y, p.out_width);
    } else {
      filter_columns(axis, x, p.height, size, row, rows.row);
      filter_row(axis, rows, y, p.out_width);
    }
  }
}

bool is_box(const ResampleParams& p) { return p.taps == 2 && p.filter[0] == p.filter[1]; }

}  // namespace

void resample_down(const ResampleParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    if (!is_box(p)) {
      any_filter<false, T>(p, begin, end);
    } else if (p.channels_last) {
      for (int64_t item = begin; item < end; ++item) mean_pixels<T>(p, item);
    } else {
      mean_planes<T>(p, begin, end);
    }
  });
}

void resample_up(const ResampleParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    if (!is_box(p)) {
      any_filter<true, T>(p, begin, end);
      return;
    }
    const bool plain = p.out_width == 2 * p.width;
    for (int64_t item = begin; item < end; ++item) {
      if (p.channels_last) {
        spread_pixels<T>(p, item);
      } else if (plain && p.width == 4) {
        spread_plane<4, T>(p, item);
      } else if (plain && p.width == 8) {
        spread_plane<8, T>(p, item);
      } else if (plain && p.width == 16) {
        spread_plane<16, T>(p, item);
      } else {
        spread_plane<0, T>(p, item);
      }
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
