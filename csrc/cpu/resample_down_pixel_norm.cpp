#include "edm2/resample_down_pixel_norm.h"

#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

constexpr int64_t kColumns = 64;  // coarse pixels at a time

/// Working memory: a value for every channel of a block of pixels.
template <class C>
struct Scratch {
  C* data;
  explicit Scratch(int64_t channels)
      : data(static_cast<C*>(std::malloc(static_cast<size_t>(channels * kColumns) * sizeof(C)))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

/// A row of the coarse image and the two rows of the fine one that it belongs to. Element (channel, column) lies at
/// channel * plane + column * step.
struct RowPair {
  int64_t fine;  // offset of the upper row in channel 0
  int64_t fine_plane;
  int64_t below;  // to the lower row
  int64_t coarse;
  int64_t coarse_plane;
  int64_t rms;
  int64_t step;
  int64_t columns;  // of the coarse image
  int64_t fine_columns;
  bool has_coarse;
  bool has_below;

  template <class Params>
  RowPair(const Params& p, int64_t item, int64_t rows) {
    const int64_t sample = item / rows;
    const int64_t row = item % rows;
    const int64_t out_height = p.height / 2;
    columns = p.width / 2;
    fine_columns = p.width;
    step = p.channels_last ? p.channels : 1;
    fine_plane = p.channels_last ? 1 : p.height * p.width;
    coarse_plane = p.channels_last ? 1 : out_height * columns;
    below = p.width * step;
    fine = sample * p.channels * p.height * p.width + 2 * row * below;
    coarse = sample * p.channels * out_height * columns + row * columns * step;
    rms = (sample * out_height + row) * columns;
    has_coarse = row < out_height;
    has_below = 2 * row + 1 < p.height;
  }
};

// ---- NHWC: vectorised over channels ----

template <class T>
void pixels_forward(const ResampleDownPixelNormParams& p, const RowPair& r, Compute<T>* __restrict mean) {
  using C = Compute<T>;
  for (int64_t j = 0; j < r.columns; ++j) {
    const T* __restrict left = as<T>(p.x) + r.fine + 2 * j * r.step;
    const T* __restrict right = left + r.step;
    const T* __restrict below_left = left + r.below;
    const T* __restrict below_right = below_left + r.step;
    C squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < p.channels; ++c) {
      mean[c] = C(0.25) * ((widen(left[c]) + widen(right[c])) + (widen(below_left[c]) + widen(below_right[c])));
      squares += mean[c] * mean[c];
    }
    const C rms = std::sqrt(squares / static_cast<C>(p.channels));
    const C inv = C(1) / (static_cast<C>(p.eps) + rms);
    as<C>(p.rms)[r.rms + j] = rms;
    T* __restrict y = as<T>(p.y) + r.coarse + j * r.step;
    T* __restrict y_silu = as<T>(p.y_silu) + r.coarse + j * r.step;
#pragma omp simd
    for (int64_t c = 0; c < p.channels; ++c) {
      const C v = mean[c] * inv;
      y[c] = narrow<T>(v);
      y_silu[c] = narrow<T>(math::mp_silu(v));
    }
  }
}

template <class T>
void pixels_backward(const ResampleDownPixelNormBackwardParams& p, const RowPair& r, Compute<T>* __restrict grad) {
  using C = Compute<T>;
  for (int64_t j = 0; j < r.columns; ++j) {
    const int64_t at = r.coarse + j * r.step;
    const T* __restrict grad_y = as<T>(p.grad_y) + at;
    const T* __restrict grad_silu = as<T>(p.grad_silu) + at;
    const T* __restrict y = as<T>(p.y) + at;
    C dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < p.channels; ++c) {
      const C v = widen(y[c]);
      grad[c] = widen(grad_y[c]) + widen(grad_silu[c]) * math::mp_silu_grad(v);
      dot += grad[c] * v;
    }
    const C rms = as<C>(p.rms)[r.rms + j];
    const C inv = C(0.25) / (static_cast<C>(p.eps) + rms);
    const C coef = C(0.25) * math::normalize_grad_coef(dot, C(1), rms, static_cast<C>(p.channels));
    T* __restrict left = as<T>(p.grad_x) + r.fine + 2 * j * r.step;
    T* __restrict right = left + r.step;
    T* __restrict below_left = left + r.below;
    T* __restrict below_right = below_left + r.step;
#pragma omp simd
    for (int64_t c = 0; c < p.channels; ++c) {
      const T v = narrow<T>(grad[c] * inv - widen(y[c]) * coef);
      left[c] = v;
      right[c] = v;
      below_left[c] = v;
      below_right[c] = v;
    }
  }
}

// ---- NCHW: vectorised over columns; scratch is [channels, kColumns] ----

template <class T>
void planes_forward(const ResampleDownPixelNormParams& p, const RowPair& r, int64_t first, int64_t count,
                    Compute<T>* __restrict scratch) {
  using C = Compute<T>;
  C squares[kColumns] = {};
  for (int64_t c = 0; c < p.channels; ++c) {
    const T* __restrict top = as<T>(p.x) + r.fine + c * r.fine_plane + 2 * first;
    const T* __restrict bottom = top + r.below;
    C* __restrict mean = scratch + c * kColumns;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      mean[i] =
          C(0.25) * ((widen(top[2 * i]) + widen(bottom[2 * i])) + (widen(top[2 * i + 1]) + widen(bottom[2 * i + 1])));
      squares[i] += mean[i] * mean[i];
    }
  }
  C inv[kColumns];
  C* __restrict rms = as<C>(p.rms) + r.rms + first;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    rms[i] = std::sqrt(squares[i] / static_cast<C>(p.channels));
    inv[i] = C(1) / (static_cast<C>(p.eps) + rms[i]);
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t at = r.coarse + c * r.coarse_plane + first;
    T* __restrict y = as<T>(p.y) + at;
    T* __restrict y_silu = as<T>(p.y_silu) + at;
    const C* __restrict mean = scratch + c * kColumns;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const C v = mean[i] * inv[i];
      y[i] = narrow<T>(v);
      y_silu[i] = narrow<T>(math::mp_silu(v));
    }
  }
}

template <class T>
void planes_backward(const ResampleDownPixelNormBackwardParams& p, const RowPair& r, int64_t first, int64_t count,
                     Compute<T>* __restrict scratch) {
  using C = Compute<T>;
  C dots[kColumns] = {};
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t at = r.coarse + c * r.coarse_plane + first;
    const T* __restrict grad_y = as<T>(p.grad_y) + at;
    const T* __restrict grad_silu = as<T>(p.grad_silu) + at;
    const T* __restrict y = as<T>(p.y) + at;
    C* __restrict grad = scratch + c * kColumns;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const C v = widen(y[i]);
      grad[i] = widen(grad_y[i]) + widen(grad_silu[i]) * math::mp_silu_grad(v);
      dots[i] += grad[i] * v;
    }
  }
  C inv[kColumns];
  C coef[kColumns];
  const C* __restrict rms = as<C>(p.rms) + r.rms + first;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    inv[i] = C(0.25) / (static_cast<C>(p.eps) + rms[i]);
    coef[i] = C(0.25) * math::normalize_grad_coef(dots[i], C(1), rms[i], static_cast<C>(p.channels));
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    const T* __restrict y = as<T>(p.y) + r.coarse + c * r.coarse_plane + first;
    const C* __restrict grad = scratch + c * kColumns;
    T* __restrict top = as<T>(p.grad_x) + r.fine + c * r.fine_plane + 2 * first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const T v = narrow<T>(grad[i] * inv[i] - widen(y[i]) * coef[i]);
      top[2 * i] = v;
      top[2 * i + 1] = v;
    }
    std::memcpy(top + r.below, top, static_cast<size_t>(2 * count) * sizeof(T));
  }
}

/// The fine pixels of a row pair that belong to no coarse pixel have no gradient.
template <class T>
void clear_rest(const ResampleDownPixelNormBackwardParams& p, const RowPair& r) {
  const int64_t first = r.has_coarse ? 2 * r.columns : 0;
  const int64_t channels = r.step > 1 ? 1 : p.channels;  // NHWC: all channels of a pixel at once
  for (int64_t row = 0; row < (r.has_below ? 2 : 1); ++row) {
    for (int64_t c = 0; c < channels; ++c) {
      T* at = as<T>(p.grad_x) + r.fine + row * r.below + c * r.fine_plane + first * r.step;
      std::memset(at, 0, static_cast<size_t>((r.fine_columns - first) * r.step) * sizeof(T));
    }
  }
}

}  // namespace

void resample_down_pixel_norm(const ResampleDownPixelNormParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    const Scratch<Compute<T>> scratch(p.channels);
    for (int64_t item = begin; item < end; ++item) {
      const RowPair r(p, item, p.height / 2);
      if (p.channels_last) {
        pixels_forward<T>(p, r, scratch.data);
        continue;
      }
      for (int64_t first = 0; first < r.columns; first += kColumns) {
        planes_forward<T>(p, r, first, min(kColumns, r.columns - first), scratch.data);
      }
    }
  });
}

void resample_down_pixel_norm_backward(const ResampleDownPixelNormBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    const Scratch<Compute<T>> scratch(p.channels);
    for (int64_t item = begin; item < end; ++item) {
      const RowPair r(p, item, (p.height + 1) / 2);
      clear_rest<T>(p, r);
      if (!r.has_coarse) continue;
      if (p.channels_last) {
        pixels_backward<T>(p, r, scratch.data);
        continue;
      }
      for (int64_t first = 0; first < r.columns; first += kColumns) {
        planes_backward<T>(p, r, first, min(kColumns, r.columns - first), scratch.data);
      }
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
