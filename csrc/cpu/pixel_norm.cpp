#include "edm2/pixel_norm.h"

#include <cstdlib>

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

constexpr int64_t kPixelBlock = 64;

/// A few pixels of one sample, NCHW: element (channel, pixel) at channel * stride + pixel. Vectorised over pixels. The
/// block is small enough for its channels to stay in cache between the passes. Size: number of pixels if known when
/// compiling, else 0.
template <int Size>
struct PlaneBlock {
  int64_t channels;
  int64_t stride;
  int64_t size_;

  int64_t size() const { return Size > 0 ? Size : size_; }

  /// body(offset, pixel, scratch index) for every element.
  template <class F>
  void for_each(const F& body) const {
    for (int64_t c = 0; c < channels; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < size(); ++i) body(c * stride + i, i, c * kPixelBlock + i);
    }
  }

  /// sums[pixel] = sum over channels of term(offset, pixel, scratch index).
  template <class C, class F>
  void sum(C* __restrict sums, const F& term) const {
    for (int64_t i = 0; i < size(); ++i) sums[i] = 0;
    for (int64_t c = 0; c < channels; ++c) {
#pragma omp simd
      for (int64_t i = 0; i < size(); ++i) sums[i] += term(c * stride + i, i, c * kPixelBlock + i);
    }
  }
};

/// A few pixels, NHWC: element (channel, pixel) at pixel * channels + channel. Vectorised over channels.
struct RowBlock {
  int64_t channels;
  int64_t size_;

  int64_t size() const { return size_; }

  template <class F>
  void for_each(const F& body) const {
    for (int64_t i = 0; i < size_; ++i) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) body(i * channels + c, i, i * channels + c);
    }
  }

  template <class C, class F>
  void sum(C* __restrict sums, const F& term) const {
    for (int64_t i = 0; i < size_; ++i) {
      C total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t c = 0; c < channels; ++c) total += term(i * channels + c, i, i * channels + c);
      sums[i] = total;
    }
  }
};

/// rms[i] from sums of squares, and s[i] = eps + rms[i] with its inverse.
template <class C>
struct Norms {
  C rms[kPixelBlock];
  C s[kPixelBlock];
  C inv[kPixelBlock];

  Norms(const C* squares, int64_t channels, int64_t size, double eps) {
    const C n = static_cast<C>(channels);
    const C e = static_cast<C>(eps);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      rms[i] = std::sqrt(squares[i] / n);
      s[i] = rms[i] + e;
      inv[i] = C(1) / s[i];
    }
  }

  /// v / s: exactly rounded in fp64, by the inverse in fp32.
  C divide(C v, int64_t i) const {
    if constexpr (std::is_same_v<C, double>) {
      return v / s[i];
    } else {
      return v * inv[i];
    }
  }
};

template <class T, class Block>
void forward(const Block& block, const T* x, T* y, T* y_silu, double eps) {
  using C = Compute<T>;
  C squares[kPixelBlock];
  block.sum(squares, [=](int64_t at, int64_t, int64_t) {
    const C v = widen(x[at]);
    return v * v;
  });
  const Norms<C> norms(squares, block.channels, block.size(), eps);
  if (y_silu == nullptr) {
    block.for_each([=, &norms](int64_t at, int64_t i, int64_t) { y[at] = narrow<T>(norms.divide(widen(x[at]), i)); });
  } else {
    block.for_each([=, &norms](int64_t at, int64_t i, int64_t) {
      const C v = norms.divide(widen(x[at]), i);
      y[at] = narrow<T>(v);
      y_silu[at] = narrow<T>(math::mp_silu(v));
    });
  }
}

/// scratch holds the gradient of y, MP-SiLU's share included: [channels, pixels] or [pixels, channels] of the block.
template <class T, class Block>
void backward(const Block& block, const T* grad_y, const T* grad_silu, const T* x, T* grad_x, double eps,
              Compute<T>* scratch) {
  using C = Compute<T>;
  C squares[kPixelBlock];
  block.sum(squares, [=](int64_t at, int64_t, int64_t) {
    const C v = widen(x[at]);
    return v * v;
  });
  const Norms<C> norms(squares, block.channels, block.size(), eps);
  C dots[kPixelBlock];
  if (grad_silu == nullptr) {
    block.sum(dots, [=](int64_t at, int64_t, int64_t) { return widen(grad_y[at]) * widen(x[at]); });
  } else {
    block.sum(dots, [=, &norms](int64_t at, int64_t i, int64_t k) {
      const C v = widen(x[at]);
      scratch[k] = widen(grad_y[at]) + widen(grad_silu[at]) * math::mp_silu_grad(norms.divide(v, i));
      return scratch[k] * v;
    });
  }
  C coef[kPixelBlock];
  const C n = static_cast<C>(block.channels);
#pragma omp simd
  for (int64_t i = 0; i < block.size(); ++i) {
    coef[i] = math::normalize_grad_coef(dots[i], norms.inv[i], norms.rms[i], n);
  }
  if (grad_silu == nullptr) {
    block.for_each([=, &norms, &coef](int64_t at, int64_t i, int64_t) {
      grad_x[at] = narrow<T>(norms.divide(widen(grad_y[at]), i) - widen(x[at]) * coef[i]);
    });
  } else {
    block.for_each([=, &norms, &coef](int64_t at, int64_t i, int64_t k) {
      grad_x[at] = narrow<T>(norms.divide(scratch[k], i) - widen(x[at]) * coef[i]);
    });
  }
}

/// Cuts pixels [begin, end) of the whole batch into blocks; f(block, offset of its first element).
template <class F>
EDM2_FORMULA void for_blocks(const Activation& shape, int64_t begin, int64_t end, const F& f) {
  const int64_t channels = shape.channels;
  const int64_t pixels = shape.pixels;
  for (int64_t at = begin; at < end;) {
    if (shape.channels_last) {
      const int64_t size = min(kPixelBlock / 4, end - at);
      f(RowBlock{channels, size}, at * channels);
      at += size;
      continue;
    }
    const int64_t pixel = at % pixels;
    const int64_t size = min(pixels - pixel, end - at);
    const int64_t offset = (at / pixels * channels) * pixels + pixel;
    if (size >= kPixelBlock) {
      f(PlaneBlock<kPixelBlock>{channels, pixels, kPixelBlock}, offset);
      at += kPixelBlock;
    } else if (size >= 16) {
      f(PlaneBlock<16>{channels, pixels, 16}, offset);
      at += 16;
    } else {
      f(PlaneBlock<0>{channels, pixels, size}, offset);
      at += size;
    }
  }
}

template <class T>
T* shifted(T* p, int64_t offset) {
  return p == nullptr ? nullptr : p + offset;
}

}  // namespace

void pixel_norm(const PixelNormParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    for_blocks(p.shape, begin, end, [&](const auto& block, int64_t offset) {
      forward(block, as<T>(p.x) + offset, as<T>(p.y) + offset, shifted(as<T>(p.y_silu), offset), p.eps);
    });
  });
}

void pixel_norm_backward(const PixelNormBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    C* scratch = nullptr;
    if (p.grad_silu != nullptr) {
      scratch = static_cast<C*>(std::malloc(static_cast<size_t>(p.shape.channels * kPixelBlock) * sizeof(C)));
    }
    for_blocks(p.shape, begin, end, [&](const auto& block, int64_t offset) {
      backward(block, as<T>(p.grad_y) + offset, shifted(as<T>(p.grad_silu), offset), as<T>(p.x) + offset,
               as<T>(p.grad_x) + offset, p.eps, scratch);
    });
    std::free(scratch);
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
