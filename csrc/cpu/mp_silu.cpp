#include "edm2/mp_silu.h"

#include "kernels.h"
#include "storage.h"

namespace edm2::cpu::EDM2_CPU_ISA {
namespace {

using math::mp_silu_grad;

template <class T>
void silu(const T* __restrict x, T* __restrict y, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(math::mp_silu(widen(x[i])));
}

template <class T>
void silu_backward(const T* __restrict grad_y, const T* __restrict x, T* __restrict grad_x, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) grad_x[i] = narrow<T>(widen(grad_y[i]) * mp_silu_grad(widen(x[i])));
}

/// One plane: c is the same for all its pixels.
template <class T>
void modulated_plane(const T* __restrict x, Compute<T> c, T* __restrict y, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(math::mp_silu(widen(x[i]) * c));
}

/// One pixel, channels_last: c lies beside x.
template <class T>
void modulated_pixel(const T* __restrict x, const T* __restrict c, T* __restrict y, int64_t channels) {
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i) y[i] = narrow<T>(math::mp_silu(widen(x[i]) * widen(c[i])));
}

constexpr int64_t kChunk = 128;

/// Dropout's factor, 0 or scale, for `count` <= kChunk elements from `first` on in the order of its mask (philox.h).
template <class C>
void dropout_factors(const Dropout& dropout, int64_t first, int64_t count, C* __restrict factors) {
  constexpr int64_t kGroup = math::kPhiloxElements;
  uint32_t words[kChunk / 2 + kGroup];
  const int64_t seed = dropout.philox[0], offset = dropout.philox[1], subsequence = dropout.subsequence;
  const int64_t first_block = first / kGroup, skipped = first % kGroup;
  const int64_t blocks = (skipped + count + kGroup - 1) / kGroup;
#pragma omp simd
  for (int64_t block = 0; block < blocks; ++block) {
    const math::Philox bits = math::dropout_bits(first_block + block, subsequence, seed, offset);
    for (int64_t i = 0; i < 4; ++i) words[4 * block + i] = bits.words[i];
  }
  const auto threshold = static_cast<uint32_t>(dropout.threshold);
  const C scale = static_cast<C>(dropout.scale());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = skipped + i;
    factors[i] = (words[at / 2] >> (at % 2 * 16) & 0xFFFFu) < threshold ? C(0) : scale;
  }
}

/// The same for elements first, first + stride, ...
template <class C>
void dropout_factors(const Dropout& dropout, int64_t first, int64_t stride, int64_t count, C* __restrict factors) {
  const int64_t seed = dropout.philox[0], offset = dropout.philox[1], subsequence = dropout.subsequence;
  const auto threshold = static_cast<uint32_t>(dropout.threshold);
  const C scale = static_cast<C>(dropout.scale());
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<uint64_t>(first + i * stride);
    const math::Philox bits =
        math::dropout_bits(static_cast<int64_t>(at / math::kPhiloxElements), subsequence, seed, offset);
    const uint32_t low = (at & 4) != 0 ? bits.words[2] : bits.words[0];
    const uint32_t high = (at & 4) != 0 ? bits.words[3] : bits.words[1];
    const uint32_t word = (at & 2) != 0 ? high : low;
    const uint32_t half = (at & 1) != 0 ? word >> 16 : word & 0xFFFFu;
    factors[i] = half < threshold ? C(0) : scale;
  }
}

/// At most kChunk elements, each with factors of its own: dropout's, and c's unless it is one for all.
template <class T>
void dropout_chunk(const T* __restrict x, const Compute<T>* __restrict factors, Compute<T> c, T* __restrict y,
                   int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(math::mp_silu(widen(x[i]) * c) * factors[i]);
}
template <class T>
void dropout_chunk(const T* __restrict x, const Compute<T>* __restrict factors, const T* __restrict c, T* __restrict y,
                   int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = narrow<T>(math::mp_silu(widen(x[i]) * widen(c[i])) * factors[i]);
}

/// A plane or, channels_last, a pixel, followed by dropout.
template <class T>
void modulated_dropout(const MPSiLUModulatedParams& p, int64_t item) {
  const auto [batch, channels, pixels, channels_last] = p.shape;
  const int64_t size = channels_last ? channels : pixels;
  const T* x = as<T>(p.x) + item * size;
  T* y = as<T>(p.y) + item * size;
  Compute<T> factors[kChunk];
  for (int64_t at = 0; at < size; at += kChunk) {
    const int64_t count = min(kChunk, size - at);
    if (channels_last) {
      dropout_factors(p.dropout, item * channels + at, count, factors);
      dropout_chunk(x + at, factors, as<T>(p.c) + item / pixels * channels + at, y + at, count);
    } else {
      const int64_t pixel = item / channels * pixels + at;
      dropout_factors(p.dropout, pixel * channels + item % channels, channels, count, factors);
      dropout_chunk(x + at, factors, widen(as<T>(p.c)[item]), y + at, count);
    }
  }
}

/// A piece of at most kChunk pixels of one plane; returns its share of the gradient of c (spec 2.8). In type C
/// throughout: a sum over few 16-bit elements would not be vectorised.
template <class C>
C modulated_backward_chunk(const C* __restrict grad_y, const C* __restrict x, C c, C* __restrict grad_x, int64_t size) {
  C grad_c = 0;
#pragma omp simd reduction(+ : grad_c)
  for (int64_t i = 0; i < size; ++i) {
    const C grad_z = grad_y[i] * mp_silu_grad(x[i] * c);
    grad_x[i] = grad_z * c;
    grad_c += grad_z * x[i];
  }
  return grad_c;
}

/// One plane; returns the gradient of c. Its elements are at `first_masked` and every `stride` further in dropout's
/// order.
template <class T, bool kDropout>
Compute<T> modulated_backward_plane(const T* __restrict grad_y, const T* __restrict x, Compute<T> c,
                                    T* __restrict grad_x, int64_t size, const Dropout& dropout, int64_t first_masked,
                                    int64_t stride) {
  using C = Compute<T>;
  C grad_c = 0;
  for (int64_t at = 0; at < size; at += kChunk) {
    const int64_t count = min(kChunk, size - at);
    if constexpr (std::is_same_v<T, C> && !kDropout) {
      grad_c += modulated_backward_chunk(grad_y + at, x + at, c, grad_x + at, count);
    } else {
      C grad_y_wide[kChunk], x_wide[kChunk], grad_x_wide[kChunk];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad_y_wide[i] = widen(grad_y[at + i]);
      if constexpr (kDropout) {
        C factors[kChunk];
        dropout_factors(dropout, first_masked + at * stride, stride, count, factors);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) grad_y_wide[i] *= factors[i];
      }
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x_wide[i] = widen(x[at + i]);
      grad_c += modulated_backward_chunk(grad_y_wide, x_wide, c, grad_x_wide, count);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad_x[at + i] = narrow<T>(grad_x_wide[i]);
    }
  }
  return grad_c;
}

/// A block of channels of all pixels of one sample, channels_last. Sums of some pixels are summed with Kahan's
/// correction: one long sum would lose digits. Its first element is at `first_masked` in dropout's order.
template <class T, bool kDropout>
void modulated_backward_block(const T* __restrict grad_y, const T* __restrict x, const T* __restrict c,
                              T* __restrict grad_x, T* __restrict grad_c, int64_t block, int64_t channels,
                              int64_t pixels, const Dropout& dropout, int64_t first_masked) {
  using C = Compute<T>;
  constexpr int64_t kPixels = 32;
  C c_block[kModulatedChannelBlock];
  C factors[kModulatedChannelBlock];
  C total[kModulatedChannelBlock] = {};
  C excess[kModulatedChannelBlock] = {};
  for (int64_t i = 0; i < block; ++i) c_block[i] = widen(c[i]);
  for (int64_t first = 0; first < pixels; first += kPixels) {
    C sum[kModulatedChannelBlock] = {};
    for (int64_t p = first; p < min(first + kPixels, pixels); ++p) {
      const T* __restrict grad_row = grad_y + p * channels;
      const T* __restrict x_row = x + p * channels;
      T* __restrict out_row = grad_x + p * channels;
      if constexpr (kDropout) dropout_factors(dropout, first_masked + p * channels, block, factors);
#pragma omp simd
      for (int64_t i = 0; i < block; ++i) {
        const C xi = widen(x_row[i]);
        const C grad_yi = kDropout ? widen(grad_row[i]) * factors[i] : widen(grad_row[i]);
        const C grad_z = grad_yi * mp_silu_grad(xi * c_block[i]);
        out_row[i] = narrow<T>(grad_z * c_block[i]);
        sum[i] += grad_z * xi;
      }
    }
    for (int64_t i = 0; i < block; ++i) {
      const C term = sum[i] - excess[i];
      const C next = total[i] + term;
      excess[i] = (next - total[i]) - term;
      total[i] = next;
    }
  }
  for (int64_t i = 0; i < block; ++i) grad_c[i] = narrow<T>(total[i]);
}

template <class T, bool kDropout>
void modulated_backward(const MPSiLUModulatedBackwardParams& p, int64_t begin, int64_t end) {
  const auto [batch, channels, pixels, channels_last] = p.shape;
  const int64_t blocks = (channels + kModulatedChannelBlock - 1) / kModulatedChannelBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % blocks * kModulatedChannelBlock;
    const int64_t block = min(kModulatedChannelBlock, channels - first);
    const int64_t plane = item / blocks * channels + first;  // number of the block's first plane
    const int64_t first_masked = item / blocks * channels * pixels + first;
    const T* c = as<T>(p.c) + plane;
    T* grad_c = as<T>(p.grad_c) + plane;
    if (channels_last) {
      modulated_backward_block<T, kDropout>(as<T>(p.grad_y) + first_masked, as<T>(p.x) + first_masked, c,
                                            as<T>(p.grad_x) + first_masked, grad_c, block, channels, pixels, p.dropout,
                                            first_masked);
    } else {
      for (int64_t i = 0; i < block; ++i) {
        const int64_t offset = (plane + i) * pixels;
        grad_c[i] = narrow<T>(modulated_backward_plane<T, kDropout>(as<T>(p.grad_y) + offset, as<T>(p.x) + offset,
                                                                    widen(c[i]), as<T>(p.grad_x) + offset, pixels,
                                                                    p.dropout, first_masked + i, channels));
      }
    }
  }
}

}  // namespace

void mp_silu(const MPSiLUParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) { silu(as<T>(p.x) + begin, as<T>(p.y) + begin, end - begin); });
}

void mp_silu_backward(const MPSiLUBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    silu_backward(as<T>(p.grad_y) + begin, as<T>(p.x) + begin, as<T>(p.grad_x) + begin, end - begin);
  });
}

void mp_silu_modulated(const MPSiLUModulatedParams& p, int64_t begin, int64_t end) {
  const auto [batch, channels, pixels, channels_last] = p.shape;
  with_type(p.dtype, [&]<class T>(T) {
    for (int64_t item = begin; item < end; ++item) {
      if (p.dropout.philox != nullptr) {
        modulated_dropout<T>(p, item);
      } else if (channels_last) {
        const T* c = as<T>(p.c) + item / pixels * channels;
        modulated_pixel(as<T>(p.x) + item * channels, c, as<T>(p.y) + item * channels, channels);
      } else {
        modulated_plane(as<T>(p.x) + item * pixels, widen(as<T>(p.c)[item]), as<T>(p.y) + item * pixels, pixels);
      }
    }
  });
}

void mp_silu_modulated_backward(const MPSiLUModulatedBackwardParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&]<class T>(T) {
    if (p.dropout.philox != nullptr) {
      modulated_backward<T, true>(p, begin, end);
    } else {
      modulated_backward<T, false>(p, begin, end);
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
