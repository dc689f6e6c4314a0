#include "edm2/resample_down_pixel_norm.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

constexpr int64_t kBlock = kHalvingBlock;

/// Working memory: a value for every channel of a block of pixels.
template <class C>
struct Scratch {
  C* data;
  explicit Scratch(int64_t channels)
      : data(static_cast<C*>(std::malloc(static_cast<size_t>(channels * kBlock) * sizeof(C)))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// ---- NHWC: a row of y at a time, vectorised over channels ----

template <class T>
void pixels_forward(const ResampleDownPixelNormParams& p, int64_t item, Compute<T>* __restrict mean) {
  using C = Compute<T>;
  const int64_t out_height = p.height / 2;
  const int64_t out_width = p.width / 2;
  const int64_t row = item / out_height * p.height + 2 * (item % out_height);
  const T* __restrict left = as<T>(p.x) + row * p.width * p.channels;
  T* __restrict y = as<T>(p.y) + item * out_width * p.channels;
  T* __restrict y_silu = as<T>(p.y_silu) + item * out_width * p.channels;
  for (int64_t j = 0; j < out_width; ++j) {
    const T* __restrict right = left + p.channels;
    const T* __restrict below_left = left + p.width * p.channels;
    const T* __restrict below_right = below_left + p.channels;
    C squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < p.channels; ++c) {
      mean[c] = C(0.25) * ((widen(left[c]) + widen(right[c])) + (widen(below_left[c]) + widen(below_right[c])));
      squares += mean[c] * mean[c];
    }
    const C rms = std::sqrt(squares / static_cast<C>(p.channels));
    const C inv = C(1) / (static_cast<C>(p.eps) + rms);
    as<C>(p.rms)[item * out_width + j] = rms;
#pragma omp simd
    for (int64_t c = 0; c < p.channels; ++c) {
      const C v = mean[c] * inv;
      y[c] = narrow<T>(v);
      y_silu[c] = narrow<T>(math::mp_silu(v));
    }
    left += 2 * p.channels;
    y += p.channels;
    y_silu += p.channels;
  }
}

/// The last pair of rows of an odd image has one row, and no gradient.
template <class T>
void pixels_backward(const ResampleDownPixelNormBackwardParams& p, int64_t item, Compute<T>* __restrict grad) {
  using C = Compute<T>;
  const int64_t out_height = p.height / 2;
  const int64_t out_width = p.width / 2;
  const int64_t row = item % ((p.height + 1) / 2);
  const int64_t sample = item / ((p.height + 1) / 2);
  const int64_t below = p.width * p.channels;
  T* __restrict left = as<T>(p.grad_x) + (sample * p.height + 2 * row) * below;
  if (row == out_height) {
    std::memset(left, 0, static_cast<size_t>(below) * sizeof(T));
    return;
  }
  const int64_t first = (sample * out_height + row) * out_width;
  for (int64_t j = 0; j < out_width; ++j) {
    const int64_t at = (first + j) * p.channels;
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
    const C rms = as<C>(p.rms)[first + j];
    const C inv = C(0.25) / (static_cast<C>(p.eps) + rms);
    const C coef = C(0.25) * math::normalize_grad_coef(dot, C(1), rms, static_cast<C>(p.channels));
    T* __restrict right = left + p.channels;
    T* __restrict below_left = left + below;
    T* __restrict below_right = below_left + p.channels;
#pragma omp simd
    for (int64_t c = 0; c < p.channels; ++c) {
      const T v = narrow<T>(grad[c] * inv - widen(y[c]) * coef);
      left[c] = v;
      right[c] = v;
      below_left[c] = v;
      below_right[c] = v;
    }
    left += 2 * p.channels;
  }
  if (p.width % 2 != 0) {
    std::memset(left, 0, static_cast<size_t>(p.channels) * sizeof(T));
    std::memset(left + below, 0, static_cast<size_t>(p.channels) * sizeof(T));
  }
}

// ---- NCHW: a few rows of y at a time, vectorised over their pixels; the resampling kernels see them as an image ----

constexpr double kMean[2] = {0.5, 0.5};

/// Some rows of one sample of y. Element (channel, pixel) lies at at + channel * plane + pixel.
struct Rows {
  int64_t sample;
  int64_t first;
  int64_t count;
  int64_t columns;
  int64_t plane;
  int64_t at;
  int64_t rms;

  template <class Params>
  Rows(const Params& p, int64_t item) : columns(p.width / 2), plane(p.height / 2 * columns) {
    const int64_t out_height = p.height / 2;
    const int64_t rows = halving_rows(p.width);
    const int64_t items = (out_height + rows - 1) / rows;
    sample = item / items;
    first = item % items * rows;
    count = min(rows, out_height - first);
    at = sample * p.channels * plane + first * columns;
    rms = sample * plane + first * columns;
  }

  /// Those of one channel and the fine rows they belong to: the last ones of an odd image with the odd row.
  template <class Params>
  ResampleParams image(const Params& p) const {
    ResampleParams image{};
    image.batch = 1;
    image.channels = 1;
    image.height = count;
    image.width = columns;
    image.out_height = 2 * count + (first + count == p.height / 2 ? p.height % 2 : 0);
    image.out_width = p.width;
    image.dtype = p.dtype;
    image.filter = kMean;
    image.taps = 2;
    return image;
  }

  template <class Params>
  int64_t fine(const Params& p, int64_t channel) const {
    return ((sample * p.channels + channel) * p.height + 2 * first) * p.width;
  }
};

template <class T>
void planes_forward(const ResampleDownPixelNormParams& p, int64_t item) {
  using C = Compute<T>;
  const Rows r(p, item);
  ResampleParams image = r.image(p);
  std::swap(image.height, image.out_height);
  std::swap(image.width, image.out_width);
  for (int64_t c = 0; c < p.channels; ++c) {
    image.x = as<T>(p.x) + r.fine(p, c);
    image.y = as<T>(p.y) + r.at + c * r.plane;
    resample_down(image, 0, 1);
  }
  for (int64_t first = 0; first < r.count * r.columns; first += kBlock) {
    const int64_t size = min(kBlock, r.count * r.columns - first);
    T* __restrict means = as<T>(p.y) + r.at + first;
    T* __restrict y_silu = as<T>(p.y_silu) + r.at + first;
    C* __restrict rms = as<C>(p.rms) + r.rms + first;
    C squares[kBlock] = {};
    for (int64_t c = 0; c < p.channels; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) squares[i] += widen(means[c * r.plane + i]) * widen(means[c * r.plane + i]);
    }
    C inv[kBlock];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      rms[i] = std::sqrt(squares[i] / static_cast<C>(p.channels));
      inv[i] = C(1) / (static_cast<C>(p.eps) + rms[i]);
    }
    for (int64_t c = 0; c < p.channels; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const C v = widen(means[c * r.plane + i]) * inv[i];
        means[c * r.plane + i] = narrow<T>(v);
        y_silu[c * r.plane + i] = narrow<T>(math::mp_silu(v));
      }
    }
  }
}

/// `scratch` and `grad_means` hold a value for every channel of the rows.
template <class T>
void planes_backward(const ResampleDownPixelNormBackwardParams& p, int64_t item, Compute<T>* __restrict scratch,
                     T* __restrict grad_means) {
  using C = Compute<T>;
  const Rows r(p, item);
  const int64_t pixels = r.count * r.columns;
  for (int64_t first = 0; first < pixels; first += kBlock) {
    const int64_t size = min(kBlock, pixels - first);
    const T* __restrict grad_y = as<T>(p.grad_y) + r.at + first;
    const T* __restrict grad_silu = as<T>(p.grad_silu) + r.at + first;
    const T* __restrict y = as<T>(p.y) + r.at + first;
    const C* __restrict rms = as<C>(p.rms) + r.rms + first;
    C dots[kBlock] = {};
    for (int64_t c = 0; c < p.channels; ++c) {
      C* __restrict grad = scratch + c * kBlock;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const C v = widen(y[c * r.plane + i]);
        grad[i] = widen(grad_y[c * r.plane + i]) + widen(grad_silu[c * r.plane + i]) * math::mp_silu_grad(v);
        dots[i] += grad[i] * v;
      }
    }
    C inv[kBlock];
    C coef[kBlock];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      inv[i] = C(1) / (static_cast<C>(p.eps) + rms[i]);
      coef[i] = math::normalize_grad_coef(dots[i], C(1), rms[i], static_cast<C>(p.channels));
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      const C* __restrict grad = scratch + c * kBlock;
      T* __restrict out = grad_means + c * pixels + first;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] = narrow<T>(grad[i] * inv[i] - widen(y[c * r.plane + i]) * coef[i]);
    }
  }
  ResampleParams image = r.image(p);
  for (int64_t c = 0; c < p.channels; ++c) {
    image.x = grad_means + c * pixels;
    image.y = as<T>(p.grad_x) + r.fine(p, c);
    resample_up(image, 0, 1);
  }
}

}  // namespace

void resample_down_pixel_norm(const ResampleDownPixelNormParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    const Scratch<Compute<T>> scratch(p.channels);
    for (int64_t item = begin; item < end; ++item) {
      if (p.channels_last) {
        pixels_forward<T>(p, item, scratch.data);
      } else {
        planes_forward<T>(p, item);
      }
    }
  });
}

void resample_down_pixel_norm_backward(const ResampleDownPixelNormBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    const Scratch<Compute<T>> scratch(p.channels);
    const Scratch<T> grad_means(p.channels_last ? 0 : p.channels * (1 + p.width / 2 / kBlock));
    for (int64_t item = begin; item < end; ++item) {
      if (p.channels_last) {
        pixels_backward<T>(p, item, scratch.data);
      } else {
        planes_backward<T>(p, item, scratch.data, grad_means.data);
      }
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
