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

/// One plane; returns the gradient of c.
template <class T>
Compute<T> modulated_backward_plane(const T* __restrict grad_y, const T* __restrict x, Compute<T> c,
                                    T* __restrict grad_x, int64_t size) {
  using C = Compute<T>;
  C grad_c = 0;
  for (int64_t at = 0; at < size; at += kChunk) {
    const int64_t count = min(kChunk, size - at);
    if constexpr (std::is_same_v<T, C>) {
      grad_c += modulated_backward_chunk(grad_y + at, x + at, c, grad_x + at, count);
    } else {
      C grad_y_wide[kChunk], x_wide[kChunk], grad_x_wide[kChunk];
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad_y_wide[i] = widen(grad_y[at + i]);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x_wide[i] = widen(x[at + i]);
      grad_c += modulated_backward_chunk(grad_y_wide, x_wide, c, grad_x_wide, count);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) grad_x[at + i] = narrow<T>(grad_x_wide[i]);
    }
  }
  return grad_c;
}

/// A block of channels of all pixels of one sample, channels_last. Sums of some pixels are summed: one long sum would
/// lose digits.
template <class T>
void modulated_backward_block(const T* __restrict grad_y, const T* __restrict x, const T* __restrict c,
                              T* __restrict grad_x, T* __restrict grad_c, int64_t block, int64_t channels,
                              int64_t pixels) {
  using C = Compute<T>;
  constexpr int64_t kPixels = 32;
  C c_block[kModulatedChannelBlock];
  C total[kModulatedChannelBlock] = {};
  for (int64_t i = 0; i < block; ++i) c_block[i] = widen(c[i]);
  for (int64_t first = 0; first < pixels; first += kPixels) {
    C sum[kModulatedChannelBlock] = {};
    for (int64_t p = first; p < min(first + kPixels, pixels); ++p) {
      const T* __restrict grad_row = grad_y + p * channels;
      const T* __restrict x_row = x + p * channels;
      T* __restrict out_row = grad_x + p * channels;
#pragma omp simd
      for (int64_t i = 0; i < block; ++i) {
        const C xi = widen(x_row[i]);
        const C grad_z = widen(grad_row[i]) * mp_silu_grad(xi * c_block[i]);
        out_row[i] = narrow<T>(grad_z * c_block[i]);
        sum[i] += grad_z * xi;
      }
    }
    for (int64_t i = 0; i < block; ++i) total[i] += sum[i];
  }
  for (int64_t i = 0; i < block; ++i) grad_c[i] = narrow<T>(total[i]);
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
      if (channels_last) {
        const T* c = as<T>(p.c) + item / pixels * channels;
        modulated_pixel(as<T>(p.x) + item * channels, c, as<T>(p.y) + item * channels, channels);
      } else {
        modulated_plane(as<T>(p.x) + item * pixels, widen(as<T>(p.c)[item]), as<T>(p.y) + item * pixels, pixels);
      }
    }
  });
}

void mp_silu_modulated_backward(const MPSiLUModulatedBackwardParams& p, int64_t begin, int64_t end) {
  const auto [batch, channels, pixels, channels_last] = p.shape;
  const int64_t blocks = (channels + kModulatedChannelBlock - 1) / kModulatedChannelBlock;
  with_type(p.dtype, [&]<class T>(T) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks * kModulatedChannelBlock;
      const int64_t block = min(kModulatedChannelBlock, channels - first);
      const int64_t plane = item / blocks * channels + first;  // number of the block's first plane
      const T* c = as<T>(p.c) + plane;
      T* grad_c = as<T>(p.grad_c) + plane;
      if (channels_last) {
        const int64_t offset = item / blocks * channels * pixels + first;
        modulated_backward_block(as<T>(p.grad_y) + offset, as<T>(p.x) + offset, c, as<T>(p.grad_x) + offset, grad_c,
                                 block, channels, pixels);
      } else {
        for (int64_t i = 0; i < block; ++i) {
          const int64_t offset = (plane + i) * pixels;
          grad_c[i] = narrow<T>(modulated_backward_plane(as<T>(p.grad_y) + offset, as<T>(p.x) + offset, widen(c[i]),
                                                         as<T>(p.grad_x) + offset, pixels));
        }
      }
    }
  });
}

}  // namespace edm2::cpu::EDM2_CPU_ISA
